"""An agent with one fault, as a process: what a crash, a lie or a broken machine looks like from the other sites.

    python tests/faulty.py --fault CRASH_AFTER_SEND --at vote --site SITE.TOML --json --run 1

The agent is the real one; parts of it are replaced by subclasses that fail in one place, once. A file beside site.toml
remembers that the fault has struck, so that the restarted process is sound.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from swarmchain.agent import Agent
from swarmchain.checkpoint import encode_tensors
from swarmchain.cli.common import stop_on_signals, unlock
from swarmchain.config import read_site_config
from swarmchain.errors import SwarmError
from swarmchain.journal import Ballot, Journal, Promised
from swarmchain.layouts import contribution_layout
from swarmchain.outbox import Outbox
from swarmchain.protocol import (
    EFFECT_MNAT_MAX,
    Opening,
    Phase,
    Rating,
    RoundKey,
    RunView,
    compute_digest,
    encode_canonical,
    parse_opening,
)
from swarmchain.site import Site, open_contract
from swarmchain.store import Store
from swarmchain.tasks import Arrays, Assignment, Past
from swarmchain.work import RunWork

CALLS = {"commit": "commit", "vote": "vote", "open": "openRound"}


class Fault:
    """Which fault strikes where, and whether it has."""

    def __init__(self, kind: str, at: str, folder: Path) -> None:
        self.kind, self.at = kind, at
        self._mark = folder / "struck"

    def strikes(self, kind: str, at: str = "") -> bool:
        """True once, in the place that was asked for."""
        if kind != self.kind or (at and at != self.at) or self._mark.exists():
            return False
        self._mark.touch()
        return True

    def is_now(self, *kinds: str) -> bool:
        """Whether the fault is one of `kinds` and has not struck; it stays."""
        return self.kind in kinds and not self._mark.exists()

    def done(self) -> None:
        self._mark.touch()

    def crash(self, kind: str, at: str = "") -> None:
        if self.strikes(kind, at):
            os.kill(os.getpid(), signal.SIGKILL)

    def leave(self, at: str) -> None:
        """Be gone for good, as far as this process can tell."""
        if self.strikes("OFFLINE", at):
            os.kill(os.getpid(), signal.SIGKILL)


class FaultyJournal(Journal):
    """Dies before or after writing."""

    fault: Fault

    def record_contribution(self, key: RoundKey, opening: Opening, data: bytes) -> None:
        self.fault.crash("CRASH_BEFORE_JOURNAL", "commit")
        super().record_contribution(key, opening, data)

    def read_contribution(self, opening: Opening) -> bytes:
        if self.fault.kind in ("NAN", "WRONG_SHAPE"):
            return (self._blobs / opening.digest).read_bytes()
        return super().read_contribution(opening)

    def record_vote(self, key: RoundKey, ballot: Ballot) -> None:
        self.fault.crash("CRASH_BEFORE_JOURNAL", "vote")
        super().record_vote(key, ballot)

    def record_transaction(self, promised: Promised) -> None:
        at = next((at for at, call in CALLS.items() if call == promised.purpose), "")
        if at == "open":
            self.fault.crash("CRASH_BEFORE_JOURNAL", at)
        super().record_transaction(promised)
        self.fault.crash("CRASH_AFTER_JOURNAL", at)


class FaultyOutbox(Outbox):
    """Dies between sending and hearing of it."""

    fault: Fault

    def _broadcast(self, promised: Promised) -> None:
        super()._broadcast(promised)
        at = next((at for at, call in CALLS.items() if call == promised.purpose), "")
        self.fault.crash("CRASH_AFTER_SEND", at)
        if at == "commit":
            self.fault.leave("commit")


class FaultyStore(Store):
    """Withholds, spoils, or cannot write."""

    fault: Fault

    def restore_blob(self, data: bytes, *, digest: str = "") -> str:
        digest = compute_digest(data)
        if self.fault.is_now("WITHHOLDS_BLOB"):
            return digest
        spoilt = {"TRUNCATED_BLOB": data[:-7], "FLIPPED_BIT": data[:-1] + bytes([data[-1] ^ 1])}.get(self.fault.kind)
        is_lasting = self.fault.at == "lasting" and self.fault.is_now(self.fault.kind)
        if spoilt is not None and (is_lasting or self.fault.strikes(self.fault.kind, "publish")):
            self._write(self._blob_path(digest), spoilt)
            return digest
        return super().restore_blob(data, digest=digest)

    def put_opening(self, commitment: str, data: bytes) -> None:
        self.fault.crash("CRASH_AFTER_SEND", "publish")
        if self.fault.is_now("LIES_IN_OPENING"):
            data = encode_canonical(parse_opening(data).model_copy(update={"samples": 10**9}))
        if self.fault.at == "publish" and self.fault.is_now("COPYCAT"):
            others = [path for path in Path(self._root, "openings").iterdir() if path.name != commitment]
            while not others:
                time.sleep(0.05)
                others = [path for path in Path(self._root, "openings").iterdir() if path.name != commitment]
            data = others[0].read_bytes()
        super().put_opening(commitment, data)

    def put_blob(self, data: bytes, *, digest: str = "") -> str:
        if (self.fault.kind, self.fault.at) == ("STORE_FULL", "vote") and (Path(self._root).parent / "full").exists():
            # also where another site was faster: it is the write that is to fail
            self._write(self._blob_path(compute_digest(data)), data)
        return super().put_blob(data, digest=digest)

    def _write_now(self, path: str, data: bytes) -> None:
        at = "vote" if "/blobs/" in path and b"swarmchain-manifest" in data[:4000] else "publish"
        full = Path(self._root).parent / "full"
        if self.fault.kind == "STORE_FULL" and self.fault.at == at and full.exists():
            # the kernel refuses the write, as it does on a full disk
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
            try:
                super()._write_now(path, data)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            return
        super()._write_now(path, data)


class FaultyTask:
    """Trains wrongly, too long, or not at all."""

    def __init__(self, work: RunWork, fault: Fault, wait_until_over: Callable[[], None]) -> None:
        self._task, self._fault, self._wait = work.task, fault, wait_until_over
        self.labels = work.task.labels

    def describe(self) -> dict[str, int]:
        return self._task.describe()

    def contribute(self, assignment: Assignment) -> tuple[Arrays, int, dict[str, float]]:
        self._fault.crash("CRASH_IN_TRAINING")
        if self._fault.strikes("LATE", "commit"):
            self._wait()
        tensors, samples, metrics = self._task.contribute(assignment)
        if self._fault.strikes("SCALED_1000"):
            tensors = {name: value * np.float32(1000) for name, value in tensors.items()}
        if self._fault.strikes("SIGN_FLIP") or self._fault.is_now("HOSTILE"):
            tensors = {name: -value for name, value in tensors.items()}
        return tensors, samples, metrics

    def judge(self, merged: Arrays, parent: Arrays) -> tuple[bool, float | None]:
        if self._fault.strikes("LATE", "vote"):
            self._wait()
        self._fault.leave("vote")
        return self._task.judge(merged, parent)

    def rate(self, past: Past) -> tuple[Rating, ...]:
        ratings = self._task.rate(past)
        if self._fault.is_now("HOSTILE"):
            return tuple(Rating(site=rating.site, effect_mnat=EFFECT_MNAT_MAX) for rating in ratings)
        return ratings


class FaultyWork(RunWork):
    """Hands in bytes that are no contribution, dies in the merge, or votes for what nobody else computes."""

    fault: Fault

    def contribute(self, view: RunView, key: RoundKey) -> tuple[bytes, int, dict[str, float]]:
        data, samples, metrics = super().contribute(view, key)
        if key.round_id > 1 and self.fault.kind != "HOSTILE":
            self.fault.done()  # one round of it is enough: the next one shows how the site comes back
        if self.fault.strikes("NAN"):
            data = data[:-4] + np.float32("nan").tobytes()
        if self.fault.strikes("WRONG_SHAPE"):
            layout = dict(contribution_layout(self.spec))
            name = next(iter(layout))
            tensors = {n: np.zeros(shape, dtype) for n, (dtype, shape) in layout.items()}
            layout[name] = ("float32", (3, 3))
            data = encode_tensors({**tensors, name: np.zeros((3, 3), np.float32)}, layout)
        return data, samples, metrics

    def certify(self, view: RunView, key: RoundKey, **options: Any) -> Any:
        found = super().certify(view, key, **options)
        self.fault.crash("CRASH_IN_MERGE")
        if found is not None and self.fault.strikes("VOTES_FALSE_MERGE"):
            checkpoint = found.checkpoint[:-4] + np.float32(0.25).tobytes()
            manifest = found.manifest.model_copy(update={"checkpoint": compute_digest(checkpoint)})
            return dataclasses.replace(found, checkpoint=checkpoint, manifest=manifest,
                                       manifest_bytes=encode_canonical(manifest))
        return found


class FaultyAgent(Agent):
    """The agent over faulty work."""

    fault: Fault

    def _follow(self, view: RunView) -> Any:
        found = super()._follow(view)

        def wait_until_over() -> None:
            before = self.site.contract.view_run(view.run)
            while True:
                now = self.site.contract.view_run(view.run)
                if now.round_id != before.round_id or now.phase is Phase.CLOSED or now.phase is not before.phase:
                    return
                time.sleep(0.1)

        found.work.__class__ = FaultyWork
        found.work.fault = self.fault
        found.work.task = FaultyTask(found.work, self.fault, wait_until_over)
        return found


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--fault", "--at", "--site"):
        parser.add_argument(name, required=True)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", type=int, action="append")
    options = parser.parse_args()
    stopping = stop_on_signals()
    config = read_site_config(Path(options.site))
    fault = Fault(options.fault, options.at, Path(options.site).parent)
    skew = {"ahead": 86_400.0, "behind": -86_400.0}.get(options.at, 0.0)

    def now() -> float:
        return time.time() + skew

    def log(event: dict[str, Any]) -> None:
        click.echo(json.dumps({"time": round(time.time(), 3), **event}))

    signer = unlock(config)
    contract = open_contract(config)
    index = contract.get_site_index(signer.address)
    journal = FaultyJournal(config.work_dir, chain_id=contract.chain_id, contract=contract.address, site=index)
    outbox = FaultyOutbox(contract.node, journal, now=now)
    store = FaultyStore(config.store_url)
    journal.fault = outbox.fault = store.fault = fault
    contract.send = outbox.send
    if fault.strikes("COPYCAT", "commit"):
        copy_commitment(contract, signer, options.run[0], log)
    agent = FaultyAgent(Site(config, signer, contract, journal, outbox, index), store, log=log, now=now)
    agent.fault = fault
    log({"event": "started", "site": index})
    agent.run(options.run, stopping=stopping)


def copy_commitment(contract: Any, signer: Any, run: int, log: Callable[[dict[str, Any]], None]) -> None:
    """Commit to what another site has committed to, word for word."""
    while not (view := contract.view_run(run)).commitments:
        time.sleep(0.05)
    copied = next(iter(view.commitments.values()))
    contract.commit(signer, run, view.round_id, copied)
    log({"event": "copied", "run": run, "round": view.round_id})


if __name__ == "__main__":
    try:
        main()
    except SwarmError as exc:
        print(f"Error: {exc.message}", file=sys.stderr)
        sys.exit(exc.exit_code)
