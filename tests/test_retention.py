"""What `store prune` removes, and what is never removed; the rounds that are kept verify as before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import World
from test_audit import Play

from swarmchain.cli import cli
from swarmchain.errors import StoreError
from swarmchain.merging import ClippedMean
from swarmchain.protocol import encode_canonical, parse_opening
from swarmchain.retention import plan_pruning, prune, read_pruned
from swarmchain.site_text import render_site_toml
from swarmchain.spec import Limits, RehearsalSpec
from swarmchain.store import Store


@pytest.fixture
def play(world: World, tmp_path: Path) -> Play:
    limits = Limits(rounds=9, sites_to_start=3)
    return Play(world, tmp_path, RehearsalSpec(name="pruned", widths=(4, 3), merge=ClippedMean(), limits=limits))


def play_rounds(play: Play, count: int) -> list[str]:
    """Finalize so many rounds, the first with a site that is left out; returns their checkpoints."""
    checkpoints = []
    for number in range(1, count + 1):
        commitments = play.contribute(number, (0, 1, 2))
        made = play.certify(number, commitments)
        play.finalize(number, made)
        checkpoints.append(made.manifest.checkpoint)
    return checkpoints


def test_pruned_run_keeps_what_anyone_may_need(play: Play) -> None:
    checkpoints = play_rounds(play, 5)
    stray = play.store.put_blob(b"nobody's")
    contract, store = play.world.contract, play.store
    plans = plan_pruning(contract, store, keep_rounds=2)
    assert [(plan.run, plan.before_round) for plan in plans if plan.run == play.run] == [(play.run, 4)]
    before = set(store.list_all())
    prune(contract, store, plans)
    gone = before - set(store.list_all())
    assert gone == {name for plan in plans for name in plan.doomed}
    # rounds 1 to 3: three openings and contributions each, and the checkpoints that no kept round starts from
    assert sum(kind == "openings" for kind, _ in gone) == 9
    assert {name for kind, name in gone if kind == "blobs"} >= set(checkpoints[:2])
    assert len(gone) == 9 + 9 + 2
    assert store.has_blob(stray) and all(store.has_blob(digest) for digest in checkpoints[2:])
    again = plan_pruning(contract, store, keep_rounds=2)
    assert all(not plan.doomed for plan in again)


def test_kept_rounds_of_a_pruned_run_verify_and_the_others_are_named(play: Play) -> None:
    play_rounds(play, 4)
    whole = play.audit()
    assert whole.is_sound
    contract, store = play.world.contract, play.store
    prune(contract, store, plan_pruning(contract, store, keep_rounds=2))
    assert read_pruned(store, contract.key_of(play.run, 0)) == 3
    audit = play.audit()
    assert not audit.is_sound and [bool(r.findings) for r in audit.rounds] == [True, True, False, False]
    assert [r.is_recomputed for r in audit.rounds] == [False, False, True, True]
    assert all("pruned before round 3" in " ".join(r.remarks) for r in audit.rounds[:2])
    assert all(r.included for r in audit.rounds)  # the certificates are there: who was counted, with what share


def test_best_checkpoint_and_a_round_that_goes_on_are_kept(play: Play) -> None:
    checkpoints = []
    for number, score in ((1, 5000), (2, 9000), (3, 6000), (4, 6000)):
        made = play.certify(number, play.contribute(number, (0, 1)))
        pair = play.store.put_blob(bytes(made.checkpoint)), play.store.put_blob(made.manifest_bytes)
        for signer in play.world.signers[:2]:
            play.world.contract.vote(signer, (play.run, number), *pair, accept=True, score_bps=score)
        play.parent, play.previous = (pair[0], made.tensors), (pair[1], made.manifest)
        checkpoints.append(pair[0])
    running = play.contribute(5, (0, 1))
    contract, store = play.world.contract, play.store
    prune(contract, store, plan_pruning(contract, store, keep_rounds=1))
    assert [store.has_blob(digest) for digest in checkpoints] == [False, True, True, True]
    assert all(store.has_opening(commitment) for commitment in running.values())
    play.finalize(5, play.certify(5, running))


def test_opening_that_opens_nothing_removes_nothing(play: Play) -> None:
    """Whoever writes to the store must not choose what is pruned."""
    commitments = play.contribute(1, (0, 1))
    play.finalize(1, play.certify(1, commitments))
    for number in (2, 3):
        play.finalize(number, play.certify(number, play.contribute(number, (0, 1))))
    treasure = play.store.put_blob(b"of another consortium")
    opening = parse_opening(play.store.get_opening(commitments[0]))
    play.store.put_opening(commitments[0], encode_canonical(opening.model_copy(update={"digest": treasure})))
    contract = play.world.contract
    prune(contract, play.store, plan_pruning(contract, play.store, keep_rounds=1))
    assert play.store.has_blob(treasure)


def test_invalid_store_that_lost_a_spec_is_not_pruned(play: Play) -> None:
    play_rounds(play, 2)
    play.store.remove("blobs", play.world.contract.view_run(play.run).spec)
    with pytest.raises(StoreError, match="nothing is pruned"):
        plan_pruning(play.world.contract, play.store, keep_rounds=1)


def test_prune_command(play: Play, tmp_path: Path) -> None:
    play_rounds(play, 3)
    (tmp_path / "deployment.json").write_text(play.world.deployment.model_dump_json())
    (tmp_path / "site.toml").write_text(render_site_toml(
        name="North", rpc_url=play.world.contract.node.rpc_url, deployment="deployment.json", store="store"))
    command = ["store", "prune", "--site", str(tmp_path / "site.toml"), "--json"]
    done = CliRunner().invoke(cli, command)
    assert "how many rounds" in str(done.exception)
    said = json.loads(CliRunner().invoke(cli, [*command, "--keep-rounds", "1", "--dry-run"]).stdout)
    assert said["dry_run"] and said["runs"][-1]["objects"] == 6 + 6 + 1
    before = Store(str(tmp_path / "store")).list_all()
    again = json.loads(CliRunner().invoke(cli, [*command, "--keep-rounds", "1"]).stdout)
    assert again["runs"] == said["runs"]
    assert len(before) - len(play.store.list_all()) == 13


def test_note_has_a_name_of_our_own(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for name in ("../x", "", ".hidden", "a/b", "a\n"):
        with pytest.raises(StoreError, match="no name of a note"):
            store.put_note(name, b"")
