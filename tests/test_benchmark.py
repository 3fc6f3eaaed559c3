"""A swarm in one process gives the bytes of agents on a chain; arms, intervals and refusals of a benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from conftest import write_cells

from swarmchain.arena import open_arena
from swarmchain.benchmark import Settings, change_law, run_benchmark
from swarmchain.benchmark_donors import run_donor_benchmark
from swarmchain.cli import cli
from swarmchain.config import DataConfig
from swarmchain.dealing import deal_pbmc, deal_splits
from swarmchain.errors import ConfigError, DataError, RunFailed, SwarmError
from swarmchain.examples import draw_weighted, sum_weights
from swarmchain.inprocess import InProcess, RoundPlayed
from swarmchain.intervals import resample_auroc, resample_macro_f1
from swarmchain.merging import ClippedMean, Outer
from swarmchain.metrics import compute_auroc, compute_macro_f1
from swarmchain.planning import plan_cell_type, plan_statistics, read_statistics
from swarmchain.protocol import Outcome
from swarmchain.scoreboard import format_row, write_figure
from swarmchain.shares import apply_shares, compute_drawn, count_own
from swarmchain.spec import Gate, Limits, Model, Normalization, RowModel, Training


@pytest.fixture(scope="module")
def pbmc(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    files = deal_pbmc(tmp_path_factory.mktemp("pbmc") / "cells", seed=0).files
    return {name: files[name] for name in ("North", "East", "South")}


def play(folder: Path, files: dict[str, Path], *, is_real: bool) -> tuple[str, dict[str, float | None]]:
    """A run that leaves nothing out: coded contributions with residuals, layers of a site's own, an outer optimiser."""
    cells = {name: DataConfig(path=str(path), label_column="cell_type") for name, path in files.items()}
    with open_arena(folder, cells, is_real=is_real, seed=0) as arena:
        cards = arena.list_cards()
        view, _ = arena.play(plan_statistics(cards, name="statistics", sites_to_start=len(cards)))
        spec, blob = plan_cell_type(
            read_statistics(arena.store, view), view, name="t", limits=Limits(rounds=3, sites_to_start=len(cards)),
            sites_per_feature_min=2, model=Model(hidden=(8,), dropout=0.2, batch_norm=True, local=("norms",)),
            training=Training(steps=4, seed=3), codec="int8", merge=ClippedMean(outer=Outer(kind="nesterov")))
        view, scores = arena.play(spec, blob)
        return view.checkpoint, scores


def test_one_process_gives_the_bytes_of_agents_on_a_chain(pbmc: dict[str, Path], tmp_path: Path) -> None:
    here = play(tmp_path / "here", pbmc, is_real=False)
    assert here == play(tmp_path / "there", pbmc, is_real=True)
    assert here == play(tmp_path / "again", pbmc, is_real=False)


def deal_counts(folder: Path, *, sites: int = 3, **obs: Any) -> tuple[Path, Path]:
    """Files of made-up counts for some sites, and a table that holds out every third cell."""
    (folder / "cells").mkdir(parents=True)
    rows = []
    for i in range(sites):
        write_cells(folder / "cells" / f"site{i}.h5ad", seed=i, **obs)
        rows += [(f"site{i}", f"s{i}c{n}", "test" if n % 5 == 0 else "train") for n in range(90)]
    table = folder / "splits.csv"
    pd.DataFrame(rows, columns=["site", "cell", "split"]).to_csv(table, index=False)
    return folder / "cells", table


def test_command_reports_every_arm(tmp_path: Path) -> None:
    cells, table = deal_counts(tmp_path)
    words = ["benchmark", "--data", str(cells), "--splits", str(table), "--rounds", "4", "--steps", "5", "--seeds", "2",
             "--set", "model.hidden=[8]", "--set", "training.lr=0.01", "--leave-one-out", "--resamples", "100",
             "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert set(found["arms"]) == {"swarm", "central", "linear", "local_mean", "local_worst",
                                  "local/site0", "local/site1", "local/site2"}
    for arm in found["arms"].values():
        assert len(arm["seeds"]) == 2
        assert arm["macro_f1"] == pytest.approx(np.mean(arm["seeds"]))
        assert arm["macro_f1"] == pytest.approx(np.mean(list(arm["per_class"].values())))
        assert arm["sd"] == pytest.approx(np.std(arm["seeds"], ddof=1))
    assert sum(found["support"].values()) == 54
    assert set(found["home"]) == set(found["left_out"]) == {"site0", "site1", "site2"}
    for entry in found["differences"].values():
        assert entry["low"] <= entry["high"]
    assert len(set(found["checkpoints"])) == 2
    assert len(format_row(found)) == 6
    for entry in found["home"].values():
        assert all(0 <= entry[f"swarm_{name}"] <= 1 for name in ("own_shares", "trained_on", "stacked"))


def test_same_settings_give_the_same_figures_and_central_may_take_all_steps(tmp_path: Path) -> None:
    cells, table = deal_counts(tmp_path)
    settings = Settings(data=cells, splits=table, rounds=2, seeds=1, resamples=100,
                        model=Model(hidden=(4,)), training=Training(steps=3))
    first, again = run_benchmark(settings), run_benchmark(settings)
    assert {**first, "wall_s": 0} == {**again, "wall_s": 0}
    write_figure(tmp_path / "a.png", first)
    write_figure(tmp_path / "b.png", again)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_one_file_with_a_site_column_deals_as_the_table_says(tmp_path: Path) -> None:
    write_cells(tmp_path / "all.h5ad")
    rows = [(f"s0c{n}", "-" if n % 3 == 0 else "AB"[n % 2], "test" if n % 3 == 0 else "train") for n in range(80)]
    pd.DataFrame(rows, columns=["cell", "deal", "split"]).to_csv(tmp_path / "splits.csv", index=False)
    dealt = deal_splits(tmp_path / "dealt", tmp_path / "all.h5ad", splits=tmp_path / "splits.csv", site_column="deal",
                        label_column="cell_type")
    assert set(dealt.files) == {"A", "B"}
    assert set(dealt.test) == {"held out"}
    held = anndata.read_h5ad(dealt.test["held out"]).obs_names
    assert held.tolist() == [f"s0c{n}" for n in range(0, 80, 3)]


def test_site_column_of_obs_is_found(tmp_path: Path) -> None:
    write_cells(tmp_path / "all.h5ad", ward=np.where(np.arange(90) < 45, "A", "B"))
    rows = [(f"s0c{n}", "test" if n % 3 == 0 else "train") for n in range(90)]
    pd.DataFrame(rows, columns=["cell", "split"]).to_csv(tmp_path / "splits.csv", index=False)
    dealt = deal_splits(tmp_path / "dealt", tmp_path / "all.h5ad", splits=tmp_path / "splits.csv", site_column="ward",
                        label_column="cell_type")
    assert set(dealt.files) == set(dealt.test) == {"A", "B"}


def spoil_table(table: Path, kind: str) -> None:
    rows = pd.read_csv(table, dtype=str)
    if kind == "no row of a site":
        rows = rows[rows["site"] != "site1"]
    elif kind == "no test cell of a site":
        rows = rows[(rows["site"] != "site1") | (rows["split"] == "train")]
    elif kind == "unknown site":
        rows.loc[0, "site"] = "elsewhere"
    elif kind == "unknown cell":
        rows.loc[0, "cell"] = "nobody"
    elif kind == "twice":
        rows = pd.concat([rows, rows.iloc[:1]])
    elif kind == "split word":
        rows.loc[4, "split"] = "tset"
    else:
        rows = rows.drop(columns=kind)
    rows.to_csv(table, index=False)


@pytest.mark.parametrize(("kind", "words"), [
    ("no row of a site", "names no train cell of the site 'site1'"),
    ("no test cell of a site", "names no test cell of the site 'site1'"),
    ("unknown site", "names the site 'elsewhere', and"),
    ("unknown cell", "names 1 cells that site0.h5ad does not hold, 'nobody' first"),
    ("twice", "names the cell 's0c0' of site0.h5ad twice"),
    ("split word", "line 6: split is 'tset'"),
    ("cell", "has no column 'cell'"),
    ("split", "has no column 'split'"),
])
def test_invalid_splits(tmp_path: Path, kind: str, words: str) -> None:
    cells, table = deal_counts(tmp_path)
    spoil_table(table, kind)
    with pytest.raises(DataError, match=words) as caught:
        run_benchmark(Settings(data=cells, splits=table))
    assert str(table) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(("changes", "words"), [
    ({"label_column": "kind"}, "has no column 'kind' in .obs"),
    ({"donor_column": "donor"}, "the donor 'd0' \\(donor\\) has cells in train and in test"),
    ({"donor_column": "patient"}, "has no column 'patient' in .obs"),
    ({"label_column": "one"}, "the column 'one' of all training cells holds same"),
])
def test_invalid_columns(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    cells, table = deal_counts(tmp_path, donor=[f"d{n % 7}" for n in range(90)], one=["same"] * 90)
    with pytest.raises(DataError, match=words) as caught:
        run_benchmark(Settings(data=cells, splits=table, **changes))
    assert str(cells) in caught.value.message or ".h5ad" in caught.value.message
    assert caught.value.hint


def test_invalid_site_column(tmp_path: Path) -> None:
    write_cells(tmp_path / "all.h5ad")
    pd.DataFrame([("s0c0", "train")], columns=["cell", "split"]).to_csv(tmp_path / "splits.csv", index=False)
    with pytest.raises(DataError, match="has the column 'ward'") as caught:
        run_benchmark(Settings(data=tmp_path / "all.h5ad", splits=tmp_path / "splits.csv", site_column="ward"))
    assert "cell_type" in caught.value.hint


@pytest.mark.parametrize("kind", ["missing", "no AnnData"])
def test_invalid_data_file(tmp_path: Path, kind: str) -> None:
    _, table = deal_counts(tmp_path)
    if kind != "missing":
        (tmp_path / "all.h5ad").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"all\.h5ad"):
        run_benchmark(Settings(data=tmp_path / "all.h5ad", splits=table))


def test_invalid_leave_one_out_of_two_sites(tmp_path: Path) -> None:
    cells, table = deal_counts(tmp_path, sites=2)
    with pytest.raises(ConfigError, match="leaves one site of two"):
        run_benchmark(Settings(data=cells, splits=table, leaves_one_out=True))


@pytest.mark.parametrize(("key", "text", "words"), [
    ("training.rate", "1", "no setting 'training.rate'"), ("lr", "1", "no setting 'lr'"),
    ("training.lr", "-1", "training.lr=-1: lr"), ("model.hidden", "wide", "model.hidden=wide: hidden"),
])
def test_invalid_setting(key: str, text: str, words: str) -> None:
    with pytest.raises(SwarmError, match=words):
        change_law(Model(), Training(), {key: text})


def test_paired_bootstrap_agrees_with_drawing_cells_one_by_one() -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 3, 300)
    good = np.where(generator.random(300) < 0.9, truth, (truth + 1) % 3)
    poor = np.where(generator.random(300) < 0.7, truth, (truth + 2) % 3)
    found = resample_macro_f1(truth, [good, poor, good], classes=4, resamples=2_000, seed=1)
    assert found.plain[0] == pytest.approx(compute_macro_f1(truth, good, classes=4))
    same = found.interval([0], [2])
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)

    drawn = []
    for _ in range(2_000):
        rows = np.concatenate([generator.choice(np.flatnonzero(truth == c), int((truth == c).sum())) for c in range(3)])
        drawn.append(compute_macro_f1(truth[rows], good[rows], classes=4)
                     - compute_macro_f1(truth[rows], poor[rows], classes=4))
    interval = found.interval([0], [1])
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert interval.low == pytest.approx(low, abs=0.01)
    assert interval.high == pytest.approx(high, abs=0.01)
    again = resample_macro_f1(truth, [good, poor, good], classes=4, resamples=2_000, seed=1)
    assert (again.scores == found.scores).all()


def test_run_that_every_gate_refuses_has_no_checkpoint(tmp_path: Path) -> None:
    cells, _ = deal_counts(tmp_path)
    room = InProcess(tmp_path / "room", {path.stem: DataConfig(path=str(path), label_column="cell_type")
                                         for path in sorted(cells.glob("*.h5ad"))})
    view = room.play(room.propose(plan_statistics(room.list_cards(), name="s", sites_to_start=3))).view
    spec, blob = plan_cell_type(
        read_statistics(room.store, view), view, name="t", sites_per_feature_min=1, model=Model(hidden=()),
        limits=Limits(rounds=3, sites_to_start=3, failures_max=2), training=Training(steps=20, lr=0.05))
    seen: list[RoundPlayed] = []
    good = room.play(room.propose(spec, seed_checkpoint=blob), watch=seen.append)
    assert tuple(seen) == good.rounds
    assert [r.outcome for r in seen] == [Outcome.FINALIZED] * 3
    assert good.checkpoint == seen[-1].checkpoint
    wild = spec.model_copy(update={"seed_checkpoint": good.checkpoint, "gate": Gate(score_drop_max=0.0),
                                   "training": Training(steps=1, lr=100.0, weight_decay=1e6)})  # turned round
    with pytest.raises(RunFailed, match="ended without a checkpoint"):
        room.play(room.propose(wild), watch=seen.append)
    assert [(r.outcome, r.checkpoint) for r in seen[3:]] == [(Outcome.REJECTED, "")] * 2


def write_rows(folder: Path, *, controls_only: bool = False) -> tuple[Path, Path]:
    """One row for each of 90 donors at three sites, three folds; a case's first features are larger."""
    generator = np.random.default_rng(0)
    is_case = np.arange(90) % 3 == 0
    site = np.array([f"site{n % 2}" if n < 60 else "site2" for n in range(90)])
    if controls_only:
        is_case &= site != "site2"
    x = generator.normal(size=(90, 8)) + 1.5 * is_case[:, None] * (np.arange(8) < 4)
    obs = pd.DataFrame({"diagnosis": np.where(is_case, "ill", "well"), "person": [f"p{n}" for n in range(90)]},
                       index=[f"r{n}" for n in range(90)])
    folder.mkdir()
    anndata.AnnData(x.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"f{i}" for i in range(8)])).write_h5ad(
        folder / "rows.h5ad")
    table = pd.DataFrame({"cell": obs.index, "site": site, "fold": generator.permutation(90) % 3})
    table.to_csv(folder / "splits.csv", index=False)
    return folder / "rows.h5ad", folder / "splits.csv"


def test_command_benchmarks_donors_over_folds(tmp_path: Path) -> None:
    data, table = write_rows(tmp_path / "in", controls_only=True)
    words = ["benchmark", "--task", "donor", "--data", str(data), "--splits", str(table), "--label-column", "diagnosis",
             "--donor-column", "person", "--normalization", "none", "--state", "none", "--labels-min", "1",
             "--rounds", "4", "--steps", "5", "--seeds", "2", "--set", "training.lr=0.03", "--resamples", "100",
             "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert set(found["arms"]) == {"swarm", "central", "linear", "local_mean", "local_worst",
                                  "local/site0", "local/site1"}
    assert (found["metric"], found["folds"], len(found["checkpoints"])) == ("auroc", 3, 6)
    assert sum(found["support"].values()) == 90
    for name, arm in found["arms"].items():
        assert arm["auroc"] == pytest.approx(np.mean(arm["seeds_auroc"]))
        assert arm["macro_f1"] == pytest.approx(np.mean(arm["seeds"]))
        assert set(arm["per_class"]) == {"ill", "well"}
        assert found["intervals"][name]["value"] == pytest.approx(arm["macro_f1"])
        assert found["auroc"]["intervals"][name]["value"] == pytest.approx(arm["auroc"])
    assert found["arms"]["swarm"]["auroc"] > 0.9
    assert len(format_row(found, metric="auroc")) == 6


def settings_of_donors(data: Path, table: Path, **changes: Any) -> Settings:
    settings: dict[str, Any] = {
        "data": data, "splits": table, "task": "donor", "label_column": "diagnosis", "donor_column": "person",
        "state": "none", "normalization": Normalization(kind="none"), "rounds": 2, "seeds": 1, "resamples": 100,
        "donor": {"model": RowModel(hidden=())}, "training": Training(steps=3)}
    return Settings(**{**settings, **changes})


def test_folds_may_be_scored_together(tmp_path: Path) -> None:
    data, table = write_rows(tmp_path / "in")
    found = run_donor_benchmark(settings_of_donors(data, table, pools_folds=True))
    assert found["pools_folds"] and len(found["arms"]["swarm"]["seeds"]) == 1
    assert set(found["arms"]) >= {"local/site0", "local/site1", "local/site2"}


@pytest.mark.parametrize(("changes", "words"), [
    ({"donor_column": None}, "needs a column that tells whose"),
    ({"leaves_one_out": True}, "is for the task cell_type"),
])
def test_invalid_donor_benchmark(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    data, table = write_rows(tmp_path / "in")
    with pytest.raises(ConfigError, match=words):
        run_donor_benchmark(settings_of_donors(data, table, **changes))


def test_invalid_single_fold(tmp_path: Path) -> None:
    data, table = write_rows(tmp_path / "in")
    pd.read_csv(table).assign(fold=0).to_csv(table, index=False)
    with pytest.raises(DataError, match="the column fold holds '0' alone"):
        run_donor_benchmark(settings_of_donors(data, table))


def test_resampled_auroc_agrees_with_drawing_samples_one_by_one() -> None:
    generator = np.random.default_rng(0)
    truth = (np.arange(80) < 25).astype(np.int64)
    good, poor = (np.round(truth * gap + generator.normal(size=80), 1) for gap in (2.0, 0.5))
    found = resample_auroc(truth, [good, poor], resamples=1_000, seed=1)
    assert found.plain == pytest.approx([compute_auroc(truth, good), compute_auroc(truth, poor)])
    drawn = []
    for _ in range(1_000):
        rows = np.concatenate([generator.choice(np.flatnonzero(truth == c), int((truth == c).sum())) for c in (0, 1)])
        drawn.append(compute_auroc(truth[rows], good[rows]) - compute_auroc(truth[rows], poor[rows]))
    interval = found.interval([0], [1])
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.03)
    assert np.isnan(resample_auroc(truth[:20], [good[:20]], resamples=5, seed=0).plain).all()


def test_weighted_draws_are_those_of_numpy() -> None:
    weights = np.random.default_rng(0).random(50)
    weights /= weights.sum()
    expected = np.random.default_rng(1).choice(50, size=(7, 9), p=weights)
    assert (draw_weighted(np.random.default_rng(1), sum_weights(weights), (7, 9)) == expected).all()


def test_own_shares_move_calls_as_bayes_says() -> None:
    spec: Any = SimpleNamespace(training=Training(class_balance="inverse_sqrt"))
    drawn = compute_drawn(np.array([900, 100]), spec)
    assert drawn == pytest.approx([0.75, 0.25])
    own = count_own(np.array([0] * 8 + [1] * 88), 2)
    assert own == pytest.approx([9 / 98, 89 / 98])
    found = apply_shares(np.array([[0.75, 0.25]], np.float32), own, drawn)
    assert found[0] == pytest.approx(own)  # cells that tell nothing are called as the shares say
    assert apply_shares(np.array([[0.2, 0.8]], np.float32), drawn, drawn)[0] == pytest.approx([0.2, 0.8])
