"""What this site promised, on disk before the promise is made.

An SQLite file, bound to one chain, one contract and one site, readable by its owner only. A contribution is written
here before its commitment goes on chain, so that a restarted agent opens exactly what it committed to; a second,
different contribution to the same round is refused. The contribution's own bytes lie beside it, under their digest. A
transaction's signed bytes and nonce are written here before they are sent, so that a restarted agent sends the same
ones again and never others. What is written is on the disk when the call returns.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from swarmchain.config import write_file
from swarmchain.errors import ConfigError, JournalError, SendingBusy
from swarmchain.protocol import Opening, Rating, RoundKey, compute_digest

SCHEMA = 4
RECENT = 32
LOCK_PAUSE_S = 0.05
_TABLES = f"""
begin immediate;
create table if not exists owner (chain_id integer, contract text, site integer);
create table if not exists contribution (
    run integer, round integer, digest text, samples integer, labels text, ratings text, nonce text,
    primary key (run, round));
create table if not exists vote (
    run integer, round integer, checkpoint text, manifest text, accept integer, score_bps integer, included text,
    primary key (run, round));
create table if not exists transactions (
    address text, nonce integer, digest text primary key, purpose text, raw blob, call text, gas integer,
    fees text, sent_at real, is_settled integer default 0);
create table if not exists pace (run integer primary key, train_s real, window_s real);
pragma user_version = {SCHEMA};
commit;
"""


@dataclass(frozen=True)
class Ballot:
    """One vote: on what, whether it accepts, the score in 1/10,000, and which sites' contributions were counted."""

    checkpoint: str
    manifest: str
    accept: bool
    score_bps: int
    included: frozenset[int]


@dataclass(frozen=True)
class Promised:
    """One signed transaction that may not be in a block yet.

    `digest` is its hash; `call`, `gas` and `fees` are what was signed; `sent_at` is when, by this machine's clock.
    """

    address: str
    nonce: int
    digest: str
    purpose: str
    raw: bytes
    call: dict[str, str]
    gas: int
    fees: dict[str, int]
    sent_at: float


@dataclass(frozen=True)
class Pace:
    """How long the last local training took, and how long the run's rounds wait for one; in seconds."""

    run: int
    train_s: float
    window_s: float

    @property
    def is_too_slow(self) -> bool:
        """Whether the site cannot make the window."""
        return self.train_s > self.window_s


class Journal:
    """A site's memory.

    Raises
    ------
    JournalError
        If the file belongs to another site or contract, was written by a newer version, is no journal, or cannot be
        written.
    """

    def __init__(self, folder: Path, *, chain_id: int, contract: str, site: int) -> None:
        self.folder = folder
        self.path = folder / "journal.sqlite"
        self._blobs = folder / "contributions"
        owner = (chain_id, contract.lower(), site)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            # full: what is written survives a power failure; the autocommit of isolation_level=None is each call's
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=10.0)
            self._require_schema()
            self._db.execute("pragma journal_mode = wal")
            self._db.execute("pragma synchronous = full")
            self._db.executescript(_TABLES)
            self._db.execute("insert into owner select ?, ?, ? where not exists (select 1 from owner)", owner)
            found = self._db.execute("select chain_id, contract, site from owner").fetchone()
        except (OSError, sqlite3.Error) as exc:
            raise JournalError(f"cannot use the journal {self.path}: {exc}", hint="check [agent] work_dir") from exc
        if tuple(found) != owner:
            self.close()
            raise JournalError(
                f"the journal {self.path} belongs to site {found[2]} of contract {found[1]} on chain {found[0]}",
                hint="give every site and every contract a work_dir of its own",
            )

    def _require_schema(self) -> None:
        # one statement, so that another process that is just creating the tables is seen before or after it
        query = "select user_version, (select count(*) from sqlite_master) from pragma_user_version"
        schema, tables = self._db.execute(query).fetchone()
        is_old = schema == 0 and tables > 0
        if schema not in (0, SCHEMA) or is_old:
            self.close()
            age = "an older" if is_old or schema < SCHEMA else "a newer"
            raise JournalError(
                f"the journal {self.path} was written by {age} version of swarmchain",
                hint="use that version until its runs are over, or name a new [agent] work_dir after that",
            )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextlib.contextmanager
    def lock_sending(self, *, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
        """Hold the right to use the key's next nonce: the agent and a command of the same site take turns.

        Raises
        ------
        SendingBusy
            If another process holds it for `timeout_s`.
        """
        with self._refuse():
            file = (self.folder / "sending.lock").open("ab")
        with file:
            deadline = clock() + timeout_s
            while not _try_lock(file.fileno()):
                if clock() > deadline:
                    raise SendingBusy(
                        f"another process of this site is sending a transaction since {timeout_s:.0f} s",
                        hint="wait until it is done: `swarmchain status` shows whether the chain moves",
                    )
                time.sleep(LOCK_PAUSE_S)
            yield

    def get_contribution(self, key: RoundKey) -> Opening | None:
        """What this site committed to in a round, if anything."""
        row = self._db.execute(
            "select digest, samples, labels, ratings, nonce from contribution where run = ? and round = ?",
            (key.run, key.round_id),
        ).fetchone()
        if row is None:
            return None
        ratings = tuple(Rating(site=site, effect_mnat=effect) for site, effect in json.loads(row[3]))
        return Opening(digest=row[0], samples=row[1], labels=tuple(json.loads(row[2])), ratings=ratings, nonce=row[4])

    def record_contribution(self, key: RoundKey, opening: Opening, data: bytes) -> None:
        """Write a promise and its bytes down. Raises `JournalError` if another one stands for this round."""
        before = self.get_contribution(key)
        if before is not None:
            if before != opening:
                raise JournalError(
                    f"run {key.run}, round {key.round_id}: this site already promised {before.digest[:12]}…",
                    hint="local training must be repeatable: did the data, the threads or the software change?",
                )
            return
        with self._refuse():
            write_file(self._blobs / opening.digest, data, mode=0o600)
        self._write(
            "insert into contribution values (?, ?, ?, ?, ?, ?, ?)",
            (key.run, key.round_id, opening.digest, opening.samples, json.dumps(opening.labels),
             json.dumps([[rating.site, rating.effect_mnat] for rating in opening.ratings]), opening.nonce),
        )

    def read_contribution(self, opening: Opening) -> bytes:
        """The bytes of a promised contribution. Raises `JournalError` if they are gone or altered."""
        path = self._blobs / opening.digest
        try:
            data = path.read_bytes()
        except OSError as exc:
            raise JournalError(f"cannot read the contribution {path}: {exc.strerror}") from exc
        if compute_digest(data) != opening.digest:
            raise JournalError(f"the contribution {path} was altered", hint="check the disk")
        return data

    def discard_contributions(self, run: int, *, before_round: int) -> None:
        """Remove the bytes (not the promises) of rounds that are over."""
        rows = self._db.execute(
            "select digest from contribution where run = ? and round < ?", (run, before_round)
        ).fetchall()
        for (digest,) in rows:
            (self._blobs / digest).unlink(missing_ok=True)

    def get_vote(self, key: RoundKey) -> Ballot | None:
        """The newest vote of this site in a round, if any."""
        row = self._db.execute(
            "select checkpoint, manifest, accept, score_bps, included from vote where run = ? and round = ?",
            (key.run, key.round_id),
        ).fetchone()
        return None if row is None else Ballot(row[0], row[1], bool(row[2]), row[3], frozenset(json.loads(row[4])))

    def record_vote(self, key: RoundKey, ballot: Ballot) -> None:
        """Write a vote down; a vote may move, the newest stands."""
        self._write(
            "insert or replace into vote values (?, ?, ?, ?, ?, ?, ?)",
            (key.run, key.round_id, ballot.checkpoint, ballot.manifest, int(ballot.accept), ballot.score_bps,
             json.dumps(sorted(ballot.included))),
        )

    def get_pending(self, address: str) -> list[Promised]:
        """Transactions of a key that were not seen in a block, in the order of their nonces and of signing."""
        return self._read_promised("address = ? and not is_settled", (address,))

    def get_recent(self, address: str, *, from_nonce: int) -> list[Promised]:
        """Transactions from a nonce on, whether or not they were seen in a block, in the same order."""
        return self._read_promised("address = ? and nonce >= ?", (address, from_nonce))

    def _read_promised(self, condition: str, values: tuple[object, ...]) -> list[Promised]:
        columns = "address, nonce, digest, purpose, raw, call, gas, fees, sent_at"
        query = f"select {columns} from transactions where {condition} order by nonce, sent_at"  # noqa: S608 - ours
        rows = self._db.execute(query, values).fetchall()
        return [Promised(address, nonce, digest, purpose, raw, json.loads(call), gas, json.loads(fees), sent_at)
                for address, nonce, digest, purpose, raw, call, gas, fees, sent_at in rows]

    def record_transaction(self, promised: Promised) -> None:
        """Write a signed transaction down, before it is sent."""
        p = promised
        # what the chain once had under this nonce and later ones, it has lost
        self._write("delete from transactions where address = ? and nonce >= ? and is_settled", (p.address, p.nonce))
        self._write("insert or replace into transactions values (?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
                    (p.address, p.nonce, p.digest, p.purpose, p.raw, json.dumps(p.call), p.gas, json.dumps(p.fees),
                     p.sent_at))

    def settle_nonce(self, address: str, nonce: int) -> None:
        """One transaction of this nonce is in a block. The last ones are kept, should the chain lose blocks."""
        self._write("update transactions set is_settled = 1 where address = ? and nonce <= ?", (address, nonce))
        self._write("delete from transactions where address = ? and nonce <= ?", (address, nonce - RECENT))

    def forget_transaction(self, digest: str) -> None:
        """Forget a transaction that no node took."""
        self._write("delete from transactions where digest = ?", (digest,))

    def record_pace(self, pace: Pace) -> None:
        """Remember how long local training takes."""
        self._write("insert or replace into pace values (?, ?, ?)", (pace.run, pace.train_s, pace.window_s))

    def get_pace(self, run: int) -> Pace | None:
        """How long local training took last in a run, if it was ever done."""
        row = self._db.execute("select run, train_s, window_s from pace where run = ?", (run,)).fetchone()
        return None if row is None else Pace(*row)

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        with self._refuse():
            self._db.execute(statement, values)

    @contextlib.contextmanager
    def _refuse(self) -> Iterator[None]:
        """What cannot be written down is not promised: the one seam where the disk's refusals become ours."""
        try:
            yield
        except (sqlite3.Error, OSError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
            raise JournalError(f"cannot write the journal {self.path}: {reason}", hint="check free space") from exc
        except ConfigError as exc:
            raise JournalError(f"cannot write beside the journal {self.path}: {exc.message}", hint=exc.hint) from exc


def read_paces(folder: Path) -> dict[int, Pace]:
    """What a site's journal says of its training times, by run; nothing where there is no journal yet.

    Raises
    ------
    JournalError
        If the file is no journal of this version.
    """
    path = folder / "journal.sqlite"
    if not path.exists():
        return {}
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10.0)) as db:
            return {row[0]: Pace(*row) for row in db.execute("select run, train_s, window_s from pace")}
    except sqlite3.Error as exc:
        raise JournalError(f"cannot read the journal {path}: {exc}", hint="is it one of this version?") from exc


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
