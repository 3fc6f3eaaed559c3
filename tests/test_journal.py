"""The site's memory: what is written is there after a crash, and what cannot be written is not promised."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from swarmchain.errors import JournalError, SendingBusy
from swarmchain.journal import Ballot, Journal, Pace, Promised
from swarmchain.protocol import Opening, RoundKey, compute_digest

ZERO = "0" * 64
KEY = RoundKey(31337, "0x" + "1" * 40, 1, 1)


def open_journal(folder: Path, site: int = 0) -> Journal:
    return Journal(folder, chain_id=31337, contract=KEY.contract, site=site)


def make_promise(nonce: int = 0, digest: str = "aa", sent_at: float = 1.0) -> Promised:
    return Promised("0xA", nonce, digest, "commit", b"raw", {"to": "0xb", "data": "0x1"}, 100, {"gasPrice": 0}, sent_at)


def test_journal_remembers_over_a_restart(tmp_path: Path) -> None:
    opening = Opening(digest=compute_digest(b"x"), samples=3, nonce=ZERO)
    journal = open_journal(tmp_path)
    journal.record_contribution(KEY, opening, b"x")
    journal.record_vote(KEY, Ballot("c", "m", True, 12, frozenset({0, 2})))
    journal.record_transaction(make_promise())
    journal.record_pace(Pace(1, 12.5, 10.0))
    journal.close()
    journal = open_journal(tmp_path)
    assert journal.get_contribution(KEY) == opening
    assert journal.read_contribution(opening) == b"x"
    assert journal.get_vote(KEY) == Ballot("c", "m", True, 12, frozenset({0, 2}))
    assert journal.get_pending("0xA") == [make_promise()]
    pace = journal.get_pace(1)
    assert pace is not None and pace.is_too_slow
    with pytest.raises(JournalError, match="already promised"):
        journal.record_contribution(KEY, opening.model_copy(update={"samples": 4}), b"x")
    journal.close()
    assert (tmp_path / "journal.sqlite").stat().st_mode & 0o077 == 0


def test_journal_settles_a_nonce_with_all_that_were_signed_for_it(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    for nonce, digest in ((4, "aa"), (4, "bb"), (5, "cc")):
        journal.record_transaction(make_promise(nonce, digest))
    journal.settle_nonce("0xA", 4)
    assert [p.digest for p in journal.get_pending("0xA")] == ["cc"]
    assert [p.digest for p in journal.get_recent("0xA", from_nonce=4)] == ["aa", "bb", "cc"]
    journal.forget_transaction("cc")
    assert journal.get_pending("0xA") == []
    journal.close()


def test_invalid_journal_of_another_site_or_contract(tmp_path: Path) -> None:
    open_journal(tmp_path).close()
    with pytest.raises(JournalError, match="belongs to site 0 of contract 0x1111"):
        open_journal(tmp_path, site=1)
    with pytest.raises(JournalError, match="on chain 31337"):
        Journal(tmp_path, chain_id=1, contract=KEY.contract, site=0)


@pytest.mark.parametrize(("schema", "age"), [(99, "a newer"), (1, "an older"), (0, "an older")])
def test_invalid_journal_of_another_version(tmp_path: Path, schema: int, age: str) -> None:
    open_journal(tmp_path).close()
    with sqlite3.connect(tmp_path / "journal.sqlite") as db:
        db.execute(f"pragma user_version = {schema}")
    db.close()
    before = (tmp_path / "journal.sqlite").read_bytes()
    with pytest.raises(JournalError, match=f"was written by {age} version"):
        open_journal(tmp_path)
    assert (tmp_path / "journal.sqlite").read_bytes() == before


def test_invalid_journal_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"this is no database, and long enough to look like one" * 10)
    with pytest.raises(JournalError, match="cannot use the journal"):
        open_journal(tmp_path)


FULL = """
import resource, sys
from pathlib import Path
from swarmchain.errors import JournalError, SendingBusy
from swarmchain.journal import Journal
from swarmchain.protocol import Opening, RoundKey, compute_digest
key = RoundKey(31337, "0x" + "1" * 40, 1, 1)
journal = Journal(Path(sys.argv[1]), chain_id=31337, contract=key.contract, site=0)
data = bytes(int(sys.argv[2]))
opening = Opening(digest=compute_digest(data), samples=1, nonce="0" * 64)
used = max(path.stat().st_size for path in Path(sys.argv[1]).iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (used, used))
try:
    journal.record_contribution(key, opening, data)
except JournalError as exc:
    print(exc.message, "|", journal.get_contribution(key))
"""


@pytest.mark.parametrize("size", [10, 10_000_000])
def test_invalid_disk_that_is_full(tmp_path: Path, size: int) -> None:
    """A file-size limit makes the kernel refuse a write, as a full disk does: first the row, then the bytes."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), str(size)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot write"), done.stdout
    assert done.stdout.strip().endswith("| None")


def test_sending_is_for_one_process_at_a_time(tmp_path: Path) -> None:
    first, second = open_journal(tmp_path), open_journal(tmp_path)
    with first.lock_sending(timeout_s=1.0):
        refused = pytest.raises(SendingBusy, match="another process of this site is sending")
        with refused, second.lock_sending(timeout_s=0.1):
            raise AssertionError
    with second.lock_sending(timeout_s=0.1):
        pass
    first.close()
    second.close()
