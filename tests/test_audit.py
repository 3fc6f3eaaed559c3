"""Verifying a run without a key: what is sound is found sound, and whatever is changed is found and named."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import World, make_world
from merges import draw

from swarmchain.audit import Audit, Record, audit_run, read_record
from swarmchain.certify import NO_PARENT, Arrays, certify, gather_one
from swarmchain.checkpoint import encode_tensors
from swarmchain.codec import encode_deltas
from swarmchain.devchain import Devchain
from swarmchain.errors import ReplayError
from swarmchain.layouts import contribution_layout, parameter_layout
from swarmchain.protocol import (
    Excluded,
    Manifest,
    Opening,
    Phase,
    Standing,
    Terms,
    compute_commitment,
    compute_digest,
    encode_canonical,
)
from swarmchain.replay import read_history, rebuild
from swarmchain.spec import Limits, RehearsalSpec, encode_spec
from swarmchain.spool import Spool
from swarmchain.store import Store
from swarmchain.tasks import start_parent

FLIPS = 1_000


@dataclass
class Play:
    """A run played by hand: three sites, one process, a real contract and store."""

    world: World
    folder: Path
    spec: RehearsalSpec
    run: int = 0
    parent: tuple[str, Arrays] = ("", {})
    previous: tuple[str, Manifest | None] = (NO_PARENT, None)
    rejections: int = 0
    store: Store = field(init=False)

    def __post_init__(self) -> None:
        (self.folder / "store").mkdir()
        self.store = Store(str(self.folder / "store"))
        self.spool = Spool(self.folder / "spool")
        self.parent = (NO_PARENT, start_parent(self.spec))
        contract, signers = self.world.contract, self.world.signers
        terms = Terms(commit_window_s=600, vote_window_s=600, sites_min=2)
        self.run = contract.propose_run(signers[0], spec=self.store.put_blob(encode_spec(self.spec)), terms=terms)
        for signer in signers:
            contract.join_run(signer, self.run)

    def contribute(self, round_id: int, sites: tuple[int, ...], *, withheld: tuple[int, ...] = ()) -> dict[int, str]:
        contract, layout = self.world.contract, parameter_layout(self.spec)
        contract.open_round(self.world.signers[0], self.run)
        key, openings = contract.key_of(self.run, round_id), {}
        for site in sites:
            deltas = {n: draw(100 * round_id + 10 * site + k, shape) for k, (n, (_, shape)) in
                      enumerate(layout.items())}
            data = encode_tensors(encode_deltas(deltas, self.spec.codec)[0], contribution_layout(self.spec))
            opening = Opening(digest=compute_digest(data), samples=10 + site, nonce=f"{site + 1:064x}")
            commitment = compute_commitment(key, site, opening)
            contract.commit(self.world.signers[site], self.run, round_id, commitment)
            openings[site] = commitment
            if site not in withheld:
                self.store.put_blob(data)
                self.store.put_opening(commitment, encode_canonical(opening))
        if contract.view_run(self.run).phase is Phase.COMMIT:
            self.world.pass_time(601)
        return openings

    def certify(self, round_id: int, commitments: dict[int, str]) -> Any:
        key, layout = self.world.contract.key_of(self.run, round_id), contribution_layout(self.spec)
        found = {site: gather_one(self.store, self.spool, commitment, layout, key=key, site=site)
                 for site, commitment in commitments.items()}
        counted = [item for item in found.values() if not isinstance(item, str)]
        excluded = [Excluded(site=site, commitment=commitments[site], reason=reason)
                    for site, reason in found.items() if isinstance(reason, str)]
        return certify(self.spec, self.parent, (counted, excluded), key=key, rejections=self.rejections,
                       previous=self.previous, spec_digest=self.world.contract.view_run(self.run).spec)

    def finalize(self, round_id: int, made: Any, *, manifest: bytes | None = None, checkpoint: bytes | None = None,
                 accept: bool = True) -> None:
        """All vote for this, and put it into the store."""
        manifest, checkpoint = manifest or made.manifest_bytes, checkpoint or bytes(made.checkpoint)
        pair = self.store.put_blob(checkpoint), self.store.put_blob(manifest)
        for signer in self.world.signers[:2]:
            self.world.contract.vote(signer, (self.run, round_id), *pair, accept=accept, score_bps=5000)
        if accept:
            self.parent, self.previous, self.rejections = (pair[0], made.tensors), (pair[1], made.manifest), 0
        else:
            self.rejections += 1

    def audit(self, **options: Any) -> Audit:
        return audit_run(read_record(self.world.contract, self.run), self.store, spool_folder=self.folder, **options)


@pytest.fixture
def play(world: World, tmp_path: Path) -> Play:
    return Play(world, tmp_path, RehearsalSpec(name="by hand", widths=(4, 3), codec="int8",
                                               limits=Limits(rounds=9, sites_to_start=3)))


def play_all(play: Play) -> None:
    """Rounds: all counted, one withheld, one refused by a majority, one that expires, and one after those."""
    play.finalize(1, play.certify(1, play.contribute(1, (0, 1, 2))))
    play.finalize(2, play.certify(2, play.contribute(2, (0, 1, 2), withheld=(2,))))
    play.finalize(3, play.certify(3, play.contribute(3, (0, 1, 2))), accept=False)
    play.contribute(4, (0, 1))
    play.world.pass_time(601)
    play.world.contract.announce(play.world.signers[2], play.run)
    play.finalize(5, play.certify(5, play.contribute(5, (0, 1, 2))))


@pytest.fixture(scope="module")
def played(anvil: Devchain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Play, Record]]:
    found = Play(make_world(anvil), tmp_path_factory.mktemp("audit"), RehearsalSpec(
        name="by hand", widths=(4, 3), codec="int8", limits=Limits(rounds=9, sites_to_start=3)))
    play_all(found)
    yield found, read_record(found.world.contract, found.run)


@pytest.mark.parametrize("is_fast", [False, True])
def test_audit_of_every_kind_of_round_is_sound(played: tuple[Play, Record], is_fast: bool) -> None:
    play, record = played
    told: list[int] = []
    audit = audit_run(record, play.store, spool_folder=play.folder, is_fast=is_fast,
                      say=lambda found: told.append(found.round_id))
    assert audit.is_sound and told == [1, 2, 3, 4, 5]
    assert [r.outcome for r in audit.rounds] == ["finalized", "finalized", "rejected", "expired", "finalized"]
    assert [r.is_recomputed for r in audit.rounds] == [not is_fast, not is_fast, False, False, not is_fast]
    assert audit.rounds[1].excluded == {"Site 2": "withheld"} and audit.rounds[0].accepting == ["Site 0", "Site 1"]
    assert audit.rounds[1].remarks == ["Site 2's opening is not in the store"] and not audit.remarks


def test_every_single_bit_change_in_the_store_is_found_and_named(played: tuple[Play, Record]) -> None:
    play, record = played
    files = sorted(path for path in (play.folder / "store").rglob("*") if path.is_file())
    chance = random.Random(3)
    for turn in range(FLIPS):
        path = files[turn % len(files)]
        good = path.read_bytes()
        bit = chance.randrange(8 * len(good))
        changed = bytearray(good)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        audit = audit_run(record, play.store, spool_folder=play.folder, is_fast=turn % 4 == 3)
        path.write_bytes(good)
        said = audit.all_findings + audit.remarks + [line for r in audit.rounds for line in r.remarks[r.round_id == 2:]]
        assert said, f"bit {bit} of {path}"
        assert audit.is_sound == (not stands_on(audit, path.name, record)), (path, said)
        named = [r.round_id for r in audit.rounds if r.findings or r.remarks[r.round_id == 2:]]
        assert named or path.name[:12] in " ".join(said) or "law" in said[0], said


def stands_on(audit: Audit, name: str, record: Record) -> bool:
    """Whether a finalized round stands on a file: all but what was disclosed to rounds 3 and 4, and voted down."""
    run = record.replica.runs[audit.run - 1]
    known = {record.view.spec}
    for number in (1, 2, 5):
        votes = next(iter(run.rounds[number - 1].votes.values()))
        known |= {votes.checkpoint, votes.manifest, *run.rounds[number - 1].commitments.values()}
    return name in known or name in CONTRIBUTIONS


CONTRIBUTIONS: set[str] = set()


@pytest.fixture(autouse=True, scope="module")
def know_contributions(played: tuple[Play, Record]) -> None:
    play, record = played
    audit = audit_run(record, play.store, spool_folder=play.folder)
    CONTRIBUTIONS.update(item["digest"] for r in audit.rounds for item in r.included)


@pytest.mark.parametrize("which", ["spec", "manifest", "checkpoint", "contribution", "opening"])
def test_a_missing_file_is_found_and_named(played: tuple[Play, Record], which: str) -> None:
    play, record = played
    audit = audit_run(record, play.store, spool_folder=play.folder)
    first = audit.rounds[0]
    name = {"spec": audit.spec, "manifest": first.manifest, "checkpoint": first.checkpoint,
            "contribution": first.included[0]["digest"], "opening": first.included[0]["commitment"]}[which]
    path = next((play.folder / "store").rglob(name))
    good = path.read_bytes()
    path.unlink()
    found = audit_run(record, play.store, spool_folder=play.folder).all_findings
    path.write_bytes(good)
    assert found and (which in found[0] or "law" in found[0]) and "not in" in found[0]


def test_run_that_goes_on_is_read_as_of_one_block(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    contract = play.world.contract
    commitments = play.contribute(1, (0, 1, 2))
    read = contract.get_sites

    def read_while_another_votes() -> Any:
        play.finalize(1, play.certify(1, commitments))
        return read()

    monkeypatch.setattr(contract, "get_sites", read_while_another_votes)
    record = read_record(contract, play.run)
    assert audit_run(record, play.store, spool_folder=play.folder).is_sound and not record.view.finalized_round


def test_round_after_one_that_is_lost_says_so(play: Play) -> None:
    play.finalize(1, play.certify(1, play.contribute(1, (0, 1, 2))))
    play.finalize(2, play.certify(2, play.contribute(2, (0, 1, 2))))
    first = play.audit().rounds[0]
    for name in (first.manifest, first.checkpoint):
        next((play.folder / "store").rglob(name)).unlink()
    audit = play.audit()
    assert [len(r.findings) for r in audit.rounds] == [2, 1] and "started from" in audit.rounds[1].findings[0]


def test_checkpoint_that_a_majority_made_up_is_found(play: Play) -> None:
    made = play.certify(1, play.contribute(1, (0, 1, 2)))
    false = bytearray(made.checkpoint)
    false[-4:] = np.float32(0.25).tobytes()
    manifest = made.manifest.model_copy(update={"checkpoint": compute_digest(false)})
    play.finalize(1, made, manifest=encode_canonical(manifest), checkpoint=bytes(false))
    play.parent = (compute_digest(false), {**made.tensors})
    found = play.audit().all_findings
    assert "round 1" in found[0] and "the merge gives" in found[0]
    assert play.audit(is_fast=True).is_sound  # digests alone do not show it


@pytest.mark.parametrize(("change", "said"), [
    ({"round": 7}, "manifest's round"), ({"chain_id": 5}, "manifest's chain_id"), ({"parent": "1" * 64}, "parent"),
    ({"spec": "1" * 64}, "manifest's spec"), ({"code": "other/1"}, "verify with the version"),
    ({"previous": "1" * 64}, "manifest's previous"), ({"standing": (Standing(site=1, harm_mnat=9),)}, "standing"),
    ({"step_scale": 0.5}, "step_scale"), ({"method": "mean"}, "method"), ({"bound": None}, "bound"),
    ({"excluded": ()}, "commitments"), ({"included": ()}, "commitments")])
def test_manifest_that_says_anything_else_is_found(play: Play, change: dict[str, Any], said: str) -> None:
    made = play.certify(1, play.contribute(1, (0, 1, 2), withheld=(2,)))
    play.finalize(1, made, manifest=encode_canonical(made.manifest.model_copy(update=change)))
    found = play.audit().all_findings
    assert found and found[0].startswith("round 1") and said in " ".join(found)


def test_weight_that_is_not_the_merges_is_found(play: Play) -> None:
    made = play.certify(1, play.contribute(1, (0, 1, 2)))
    first = made.manifest.included[0].model_copy(update={"weight": 0.9})
    changed = made.manifest.model_copy(update={"included": (first, *made.manifest.included[1:])})
    play.finalize(1, made, manifest=encode_canonical(changed))
    assert any("included is not what the merge gives" in line for line in play.audit().all_findings)


def test_excluded_site_that_had_disclosed_is_no_finding(play: Play) -> None:
    commitments = play.contribute(1, (0, 1, 2), withheld=(2,))
    play.finalize(1, play.certify(1, commitments))
    assert play.audit().is_sound


def test_file_of_nobody_is_a_remark(play: Play) -> None:
    play.finalize(1, play.certify(1, play.contribute(1, (0, 1, 2))))
    name = "ab" + "0" * 62
    (play.folder / "store" / "blobs" / "ab").mkdir(exist_ok=True)
    (play.folder / "store" / "blobs" / "ab" / name).write_bytes(b"x")
    audit = play.audit()
    assert audit.is_sound and "does not stand on" in audit.remarks[0]


def test_invalid_history_is_refused(play: Play) -> None:
    play.contribute(1, (0, 1, 2))
    events = read_history(play.world.contract)
    for lost in ("SiteAdmitted", "RunJoined", "RoundOpened"):
        with pytest.raises(ReplayError, match=r"rules|no event|the calls give"):
            rebuild(play.world.contract, [event for event in events if event.name != lost])


# -- the command


def swarmchain(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "swarmchain", *arguments], capture_output=True, text=True)


def verify(play: Play, *options: str) -> subprocess.CompletedProcess[str]:
    deployment = play.folder / "deployment.json"
    deployment.write_text(play.world.deployment.model_dump_json())
    arguments = ["run", "verify", str(play.run), "--rpc", play.world.contract.node.rpc_url, "--deployment",
                 str(deployment), "--store", str(play.folder / "store"), "--out", str(play.folder / "out"), *options]
    return swarmchain(*arguments)


def test_command_writes_the_page_and_exits_0(played: tuple[Play, Record]) -> None:
    play, _ = played
    done = verify(play)
    assert done.returncode == 0, done.stdout
    assert len(re.findall(r"^✓ round", done.stdout, re.M)) == 5 and "recomputed bit for bit" in done.stdout
    found = json.loads((play.folder / "out" / "audit.json").read_text())
    assert found["is_sound"] and found["format"] == "swarmchain-audit/1" and len(found["rounds"]) == 5
    page = (play.folder / "out" / "audit.html").read_text()
    assert "Proven: every merge was computed again" in page and found["checkpoint"] in page


def test_command_names_the_round_and_exits_1(played: tuple[Play, Record]) -> None:
    play, _ = played
    path = next((play.folder / "store").rglob(sorted(CONTRIBUTIONS)[0]))
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    done = verify(play, "--json")
    path.write_bytes(good)
    assert done.returncode == 1 and re.search(r"round [125]: Site \d's contribution", done.stderr)
    assert not json.loads(done.stdout)["is_sound"]
    assert "Not proven" in (play.folder / "out" / "audit.html").read_text()


def test_invalid_command_without_a_store() -> None:
    done = swarmchain("run", "verify", "1", "--rpc", "http://127.0.0.1:1")
    assert done.returncode == 1 and "--store" in done.stderr
