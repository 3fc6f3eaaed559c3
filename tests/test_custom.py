"""A network of the sites' own, through a real chain, as a user's own program trains it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from swarmchain.api import Swarm
from swarmchain.audit import audit_run, read_record
from swarmchain.certify import Arrays
from swarmchain.consortium import Consortium, start_consortium
from swarmchain.custom import CustomTask, plan_custom, require_fit
from swarmchain.dealing import deal_pbmc
from swarmchain.errors import SpecError
from swarmchain.layouts import parameter_layout
from swarmchain.spec import CustomSpec, Limits, encode_spec, parse_spec
from swarmchain.store import read_checkpoint, read_spec

EXAMPLE = ROOT / "docs" / "examples" / "own_network.py"


def run_example(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(EXAMPLE), *map(str, words)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> str:
    try:
        said, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return said


def test_example_trains_through_the_chain(tmp_path: Path) -> None:
    """Three processes of a user's own program; one dies in its first round and comes back."""
    dealt = deal_pbmc(tmp_path / "cells", seed=0)
    names = ("North", "East", "South")
    with start_consortium(tmp_path / "swarm", dict.fromkeys(names), seed=0) as consortium:
        tomls = [site.toml for site in consortium.sites]
        run = int(finish(run_example("propose", tomls[0])))
        work = [run_example("train", toml, dealt.files[name], run) for toml, name in zip(tomls, names, strict=True)]
        assert work[0].stdout is not None
        work[0].stdout.readline()  # it has trained for a round
        work[0].kill()
        work[0].communicate()
        work[0] = run_example("train", tomls[0], dealt.files[names[0]], run)
        said = [finish(process) for process in work]
        assert all("the swarm's keeps 0." in words for words in said)
        view = consortium.contract.view_run(run)
        assert view.finalized_round == 6
        spec = read_spec(consortium.store, view.spec)
        assert isinstance(spec, CustomSpec)
        audit = audit_run(read_record(consortium.contract, run), consortium.store, spool_folder=tmp_path / "spool")
        assert audit.is_sound
        assert all(round_.is_recomputed for round_ in audit.rounds)
        with pytest.raises(SpecError, match="trains a network of the sites' own"):
            check_with_agent(consortium, run)


def check_with_agent(consortium: Consortium, run: int) -> None:
    from swarmchain.config import read_site_config
    from swarmchain.work import check_run

    check_run(read_site_config(consortium.sites[0].toml), consortium.store, consortium.contract.view_run(run), site=0,
              view_run=consortium.contract.view_run)


def test_local_tensors_and_final_state(tmp_path: Path) -> None:
    """Two sites, one process: the common part is equal and on chain, the head is each site's own."""
    def build() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    with start_consortium(tmp_path / "swarm", dict.fromkeys(("a",)), seed=1) as consortium:
        model = build()
        with Swarm(consortium.sites[0].toml) as swarm:
            from swarmchain.protocol import Terms

            run = swarm.propose(model, name="heads", rounds=2, sites=1, local=("2.",), settings={"lr": 0.5},
                                terms=Terms(60, 60, 1))
            assert swarm.join(run, model) == {"lr": 0.5}
            assert swarm.join(run, model) == {"lr": 0.5}
            seeds = []
            for round_ in swarm.rounds(run, model, samples=5, score=lambda _: 0.25):
                seeds.append(round_.seed)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter += 1.0
        assert len(set(seeds)) == 2
        before, after = build().state_dict(), model.state_dict()
        for name in ("0.weight", "1.bias", "2.weight"):
            torch.testing.assert_close(after[name], before[name] + 2.0)
        view = consortium.contract.view_run(run)
        spec = read_spec(consortium.store, view.spec)
        held: Arrays = read_checkpoint(consortium.store, view.checkpoint, spec)
        np.testing.assert_array_equal(held["2.weight"], before["2.weight"].numpy())
        np.testing.assert_array_equal(held["0.weight"], after["0.weight"].numpy())
        assert "2.weight" not in parameter_layout(spec)


def plan(model: nn.Module, **about: object) -> CustomSpec:
    return plan_custom(model, name="n", limits=Limits(rounds=1, sites_to_start=1), **about)[0]  # type: ignore[arg-type]


def test_plan_travels_as_bytes() -> None:
    model = nn.Linear(2, 2)
    spec, seed = plan_custom(model, name="n", limits=Limits(rounds=1, sites_to_start=1), settings={"lr": 1, "on": True})
    assert parse_spec(encode_spec(spec)) == spec
    assert plan_custom(model, name="n", limits=spec.limits, settings={"on": True, "lr": 1}) == (spec, seed)


@pytest.mark.parametrize(("model", "about", "words"), [
    (nn.Linear(2, 2).double(), {}, "'bias' is torch.float64"),
    (nn.Linear(2, 2), {"local": ("weight", "bias")}, "no floating-point tensor is left"),
    (nn.Linear(2, 2), {"settings": {"lr": [1]}}, "settings"),
    (nn.Linear(2, 2), {"code": Path("nowhere.py")}, "cannot read nowhere.py"),
    (nn.Identity(), {}, "no run can be made of this network"),
])
def test_invalid_network(model: nn.Module, about: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        plan(model, **about)


def test_invalid_other_network_or_program(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text("a")
    spec = plan(nn.Linear(2, 2), code=program)
    with pytest.raises(SpecError, match=r"'weight' is float32\[2, 3\] here, float32\[2, 2\] in the run's spec"):
        require_fit(spec, nn.Linear(3, 2), code=program)
    with pytest.raises(SpecError, match="names a program"):
        require_fit(spec, nn.Linear(2, 2), code=None)
    program.write_text("b")
    with pytest.raises(SpecError, match=r"train\.py is"):
        require_fit(spec, nn.Linear(2, 2), code=program)


@pytest.mark.parametrize(("samples", "value", "words"), [
    (0, 1.0, "samples is 0"), (True, 1.0, "samples is True"), (3, float("nan"), "'bias' holds NaN")])
def test_invalid_training(tmp_path: Path, samples: int, value: float, words: str) -> None:
    model = nn.Linear(2, 2)
    task = CustomTask(plan(model), model, score=None, folder=tmp_path)
    with torch.no_grad():
        model.bias.fill_(value)
    with pytest.raises(SpecError, match=words):
        task.give(None, samples)  # type: ignore[arg-type]


def test_invalid_score(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    spec = plan(model)
    task = CustomTask(spec, model, score=lambda _: 1.5, folder=tmp_path)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    with pytest.raises(SpecError, match=r"score gave 1\.5"):
        task.judge(state, state)
