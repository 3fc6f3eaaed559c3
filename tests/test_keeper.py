"""What stays at a site, and what a merge leaves alone: local layers, batch normalisation, what coding lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_cells
from merges import make_input, make_settings
from test_trainer import SPEC, make_cells

from swarmchain.audit import audit_run, read_record
from swarmchain.checkpoint import allocate_tensors
from swarmchain.consortium import start_consortium
from swarmchain.keeper import KEPT, Keeper
from swarmchain.layouts import Layout, checkpoint_layout, contribution_layout, local_layout
from swarmchain.merge import merge_deltas
from swarmchain.merging import Outer
from swarmchain.model import draw_state
from swarmchain.planning import plan_cell_type, plan_statistics, read_statistics
from swarmchain.protocol import Outcome, Terms
from swarmchain.spec import CellTypeSpec, Limits, Model, Training
from swarmchain.trainer import train_round

LAYOUT: Layout = {"w": ("float32", (2,))}


def tensors(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full(2, value, np.float32)}


def test_keeper_reads_the_newest_up_to_a_round(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, "residual", LAYOUT)
    assert keeper.read(5) is None
    for number in (2, 4):
        keeper.write(number, tensors(number))
    assert keeper.read(1) is None
    assert [float((keeper.read(n) or {})["w"][0]) for n in (2, 3, 4, 9)] == [2, 2, 4, 4]


def test_keeper_forgets_what_is_long_over_and_passes_over_what_was_altered(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, "local", LAYOUT)
    for number in range(1, KEPT + 3):
        keeper.write(number, tensors(number))
    assert keeper.read(2) is None and keeper.read(3) is not None
    (tmp_path / f"local-{KEPT + 2}.safetensors").write_bytes(b"x")
    assert keeper.read(KEPT + 2) is None
    Keeper(tmp_path, "none", {}).write(1, {})
    assert not list(tmp_path.glob("none*"))


def make_spec(**model: Any) -> CellTypeSpec:
    return SPEC.model_copy(update={"model": Model(hidden=(8,), **model)})


@pytest.mark.parametrize(("model", "gone"), [
    ({"batch_norm": True}, {"norms.0.num_batches_tracked"}),
    ({"batch_norm": True, "local": ("norms",)}, {f"norms.0.{n}" for n in (
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked")}),
    ({"local": ("head",)}, {"layers.1.weight", "layers.1.bias"}),
])
def test_contributions_lack_counters_and_what_is_local(model: dict[str, Any], gone: set[str]) -> None:
    spec = make_spec(**model)
    network = {n for n in checkpoint_layout(spec) if not n.startswith("standardize.")}
    assert network - set(contribution_layout(spec)) == gone
    assert set(local_layout(spec)) == (gone if "local" in model else set())


def test_training_moves_the_running_statistics_and_keeps_what_is_local() -> None:
    spec = make_spec(batch_norm=True, local=("norms",))
    found = train_round(draw_state(spec), make_cells(), spec, round_id=1, site=0)
    assert not any(name.startswith("norms.") for name in found.deltas)
    assert np.abs(found.local["norms.0.running_mean"]).max() > 0
    assert found.local["norms.0.num_batches_tracked"] == spec.training.steps
    shared = train_round(draw_state(spec), make_cells(), make_spec(batch_norm=True), round_id=1, site=0)
    assert np.abs(shared.deltas["norms.0.running_mean"]).max() > 0 and not shared.local


def test_merge_floors_variances_carries_counters_and_spares_statistics_the_outer_step() -> None:
    parent = {"n.running_mean": np.zeros(2, np.float32), "n.running_var": np.full(2, 0.1, np.float32),
              "n.weight": np.zeros(2, np.float32), "outer.m.n.weight": np.zeros(2, np.float32),
              "n.num_batches_tracked": np.array(7)}
    layout: Layout = {name: (str(a.dtype), a.shape) for name, a in parent.items()}  # type: ignore[misc]
    deltas = {name: np.full(2, -0.5, np.float32) for name in ("n.running_mean", "n.running_var", "n.weight")}
    _, into = allocate_tensors(layout)
    settings = make_settings("mean", outer=Outer(kind="momentum", lr=0.1).model_dump())
    merge_deltas(parent, [make_input(0, deltas)], settings, into=into)
    assert into["n.running_mean"].tolist() == [-0.5, -0.5] and into["n.running_var"].tolist() == [0, 0]
    assert into["n.weight"] == pytest.approx(-0.05) and into["n.num_batches_tracked"] == 7


@pytest.mark.parametrize("variant", [
    {"merge": make_settings("clipped_mean", outer=Outer(kind="fedadam", lr=0.05).model_dump()), "codec": "int8",
     "model": Model(hidden=(8,), batch_norm=True, local=("norms",))},
    {"merge": make_settings("coordinate_median", outer=Outer(kind="nesterov", lr=0.7).model_dump()),
     "codec": "float16", "model": Model(hidden=(8,), batch_norm=True)},
], ids=["int8 fedadam fedbn", "float16 nesterov batchnorm"])
def test_swarm_of_every_kind_agrees_and_is_proven(tmp_path: Path, variant: dict[str, Any]) -> None:
    files: dict[str, Path | None] = {f"site-{i}": write_cells(tmp_path / f"{i}.h5ad", seed=i) for i in range(3)}
    events: list[dict[str, Any]] = []
    terms = Terms(commit_window_s=120, vote_window_s=120, sites_min=2)
    with start_consortium(tmp_path / "swarm", files, seed=0, label_column="cell_type") as swarm:
        contract = swarm.contract
        first = swarm.propose(plan_statistics([s.card for s in swarm.sites], name="s", sites_to_start=3), terms=terms)
        swarm.start_agents([first, first + 1])
        swarm.follow(lambda _, event: events.append(event), until=lambda: contract.view_run(first).finalized_round > 0,
                     timeout_s=120)
        view = contract.view_run(first)
        spec, blob = plan_cell_type(read_statistics(swarm.store, view), view, name="t", sites_per_feature_min=2,
                                    limits=Limits(rounds=3, sites_to_start=3), training=Training(steps=5),
                                    **variant)
        swarm.store.put_blob(blob)
        run = swarm.propose(spec, terms=terms)
        swarm.follow(lambda _, event: events.append(event), timeout_s=120)
        ended = {event["checkpoint"] for event in events if event["event"] == "ended" and event["run"] == run}
        audit = audit_run(read_record(contract, run), swarm.store, spool_folder=tmp_path)
        assert ended == {contract.view_run(run).checkpoint}, [e for e in events if e["event"] == "cannot"]
        assert audit.is_sound and [r.outcome for r in audit.rounds] == [Outcome.FINALIZED.name.lower()] * 3
        kept = sorted(path.name for path in (tmp_path / "swarm" / "site-0").rglob("*.safetensors"))
        names = ["local"] * bool(spec.model.local) + ["residual"]
        assert kept == [f"{name}-{n}.safetensors" for name in names for n in (1, 2, 3)]

