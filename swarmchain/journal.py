"""What this site promised, on disk before the promise is made.

An SQLite file, bound to one chain, one contract and one site, readable by its owner only. A contribution is written
here before its commitment goes on chain, so that a restarted agent opens exactly what it committed to; a second,
different contribution to the same round is refused. The contribution's own bytes lie beside it, under their digest.
"""

from __future__ import annotations

import json
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from swarmchain.config import write_file
from swarmchain.errors import JournalError
from swarmchain.protocol import Opening, RoundKey, compute_digest

_TABLES = """
create table if not exists owner (chain_id integer, contract text, address text);
create table if not exists contribution (
    run integer, round integer, digest text, samples integer, salt text, metrics text, primary key (run, round));
create table if not exists vote (
    run integer, round integer, checkpoint text, manifest text, accept integer, score_bps integer, weighed integer,
    primary key (run, round));
"""


@dataclass(frozen=True)
class Ballot:
    """One vote: on what, whether it accepts, the score in 1/10,000, and how many openings were there."""

    checkpoint: str
    manifest: str
    accept: bool
    score_bps: int
    weighed: int


class Journal:
    """A site's memory.

    Raises
    ------
    JournalError
        If the file belongs to another site or contract, is no journal, or cannot be written.
    """

    def __init__(self, folder: Path, *, chain_id: int, contract: str, address: str) -> None:
        self.path = folder / "journal.sqlite"
        self._blobs = folder / "contributions"
        owner = (chain_id, contract.lower(), address.lower())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=10.0)
            self._db.execute("pragma journal_mode = wal")
            self._db.execute("pragma synchronous = full")
            self._db.executescript(_TABLES)
            found = self._db.execute("select * from owner").fetchone()
            if found is None:
                self._db.execute("insert into owner values (?, ?, ?)", owner)
        except (OSError, sqlite3.Error) as exc:
            raise JournalError(f"cannot use the journal {self.path}: {exc}", hint="check [agent] work_dir") from exc
        if found is not None and tuple(found) != owner:
            self.close()
            raise JournalError(
                f"the journal {self.path} belongs to {found[2]} on contract {found[1]} of chain {found[0]}",
                hint="give every site and every contract a work_dir of its own",
            )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def get_contribution(self, key: RoundKey) -> Opening | None:
        """What this site committed to in a round, if anything."""
        row = self._db.execute(
            "select digest, samples, salt, metrics from contribution where run = ? and round = ?",
            (key.run, key.round_id),
        ).fetchone()
        if row is None:
            return None
        return Opening(digest=row[0], samples=row[1], salt=row[2], metrics=json.loads(row[3]))

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
        write_file(self._blobs / opening.digest, data, mode=0o600)
        self._write(
            "insert into contribution values (?, ?, ?, ?, ?, ?)",
            (key.run, key.round_id, opening.digest, opening.samples, opening.salt, json.dumps(opening.metrics)),
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
            "select checkpoint, manifest, accept, score_bps, weighed from vote where run = ? and round = ?",
            (key.run, key.round_id),
        ).fetchone()
        return None if row is None else Ballot(row[0], row[1], bool(row[2]), row[3], row[4])

    def record_vote(self, key: RoundKey, ballot: Ballot) -> None:
        """Write a vote down; a vote may move, the newest stands."""
        self._write(
            "insert or replace into vote values (?, ?, ?, ?, ?, ?, ?)",
            (key.run, key.round_id, ballot.checkpoint, ballot.manifest, int(ballot.accept), ballot.score_bps,
             ballot.weighed),
        )

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.Error as exc:
            raise JournalError(f"cannot write the journal {self.path}: {exc}", hint="check free space") from exc
