"""Models of donors in other hands: evaluation, export, comparison, and calls on samples with what carried them.

One real swarm on bags of cells, trained once for all tests here; the rest goes by model folders made by hand.
"""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import mmwrite
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score
from test_donor import FEATURES, SETS, make_cells, make_constants, make_spec, write_site
from test_fcs import write_fcs
from test_release import run_command

from swarmchain.agreement import standardize
from swarmchain.bags import Pooling, SetNetwork
from swarmchain.calibration import compute_log_probabilities
from swarmchain.card import ModelCard, Provenance, read_model_folder
from swarmchain.checkpoint import encode_tensors
from swarmchain.comparing import compare_site
from swarmchain.config import read_site_config, write_file
from swarmchain.consortium import Consortium, Polling, start_consortium
from swarmchain.data import load_site_data
from swarmchain.errors import DataError, SpecError
from swarmchain.evaluating import plan_evaluation, read_evaluation
from swarmchain.examples import BagSet, list_owners, predict_bags, prepare_training, prepare_validation
from swarmchain.layouts import checkpoint_layout
from swarmchain.model import build_model, compute_attention, draw_state, load_state
from swarmchain.planning import plan_donor, plan_statistics, read_statistics
from swarmchain.protocol import RunView, compute_digest, encode_canonical
from swarmchain.selection import select_cells
from swarmchain.spec import DonorSpec, EvaluationSpec, GatedAttention, Limits, Normalization, RowModel, RunRef, Training
from swarmchain.store import read_checkpoint
from swarmchain.work import check_run

STATISTICS, TRAINING, EVALUATION = 1, 2, 3
SITES = ("North", "East", "South")
COLUMNS = ("--donor-column", "donor", "--sample-column", "sample")


@dataclass(frozen=True)
class Trained:
    """A consortium whose model of donors is trained, evaluated and exported."""

    consortium: Consortium
    view: RunView
    spec: DonorSpec
    folder: Path
    new: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("donors")
    files = {name: write_site(folder / f"{name}.h5ad", make_cells(i, donors=14)) for i, name in enumerate(SITES)}
    with start_consortium(folder / "swarm", files, seed=0, label_column="condition", donor_column="donor",
                          sample_column="sample", polling=Polling(poll_s=0.05, stagger_s=0.5)) as swarm:
        contract, store = swarm.contract, swarm.store
        run = swarm.propose(plan_statistics([s.card for s in swarm.sites], name="s", sites_to_start=3,
                                            split_by="donor"))
        swarm.start_agents([STATISTICS, TRAINING, EVALUATION])
        swarm.follow(lambda *_: None, until=lambda: contract.view_run(run).finalized_round > 0, timeout_s=120)
        view = contract.view_run(run)
        spec, blob = plan_donor(
            read_statistics(store, view), view, name="Stimulated", model=GatedAttention(encoder=(8,), attention=4),
            bag_size=8, limits=Limits(rounds=2, sites_to_start=3), sites_per_feature_min=3,
            training=Training(steps=20, batch_size=8, lr=0.02))
        store.put_blob(blob)
        assert swarm.propose(spec) == TRAINING
        swarm.follow(lambda *_: None, until=lambda: contract.view_run(TRAINING).finalized_round == 2, timeout_s=120)
        plan = folder / "evaluation.json"
        said = run_command("run", "new", "evaluation", "--site", swarm.sites[0].toml, "--run", TRAINING, "--out", plan,
                           "--cells-min", 4, "--donors-min", 2)
        assert "4 validation cells or samples, of 2 donors" in said
        assert swarm.propose(EvaluationSpec.model_validate_json(plan.read_bytes())) == EVALUATION
        swarm.follow(lambda *_: None, timeout_s=120)
        run_command("run", "export", TRAINING, "--site", swarm.sites[0].toml, "--out", folder / "model",
                    "--evaluation", EVALUATION)
        yield Trained(swarm, contract.view_run(TRAINING), spec, folder / "model",
                      write_new(folder / "new.h5ad"))


def write_new(path: Path, *, seed: int = 9, donors: int = 4) -> Path:
    """New donors' cells in a random order, with types: the stimulation shows in half of the cells."""
    plain = write_site(path, make_cells(seed, donors=donors))
    data = anndata.read_h5ad(plain)
    data = data[np.random.default_rng(0).permutation(data.n_obs)].copy()
    data.obs["kind"] = np.where(np.asarray(data.X)[:, 1] > 200, "responding", "resting")
    data.obsm["X_umap"] = np.log1p(np.asarray(data.X)[:, :2])
    data.write_h5ad(path)
    return path


def load_validation(trained: Trained) -> tuple[np.ndarray, np.ndarray]:
    """Logits and truth of all sites' validation samples, by the whole bags."""
    checkpoint = read_checkpoint(trained.consortium.store, trained.view.checkpoint, trained.spec)
    network = build_model(trained.spec).eval()
    load_state(network, checkpoint)
    logits, truth = [], []
    for site in trained.consortium.sites:
        data = load_site_data(read_site_config(site.toml), trained.spec)
        x = standardize(data.x, data.present, checkpoint)
        for sample in np.unique(data.samples[data.validation]):
            rows = data.samples == sample
            with torch.no_grad():
                logits.append(network(torch.tensor(x[rows])[None])[0].numpy())
            truth.append(int(data.y[rows][0]))
    return np.array(logits), np.array(truth)


# -- the swarm's


def test_evaluation_counts_validation_samples(trained: Trained) -> None:
    view = trained.consortium.contract.view_run(EVALUATION)
    spec, sums = read_evaluation(trained.consortium.store, view, of=trained.view)
    logits, truth = load_validation(trained)
    assert len(truth) == 12 and (spec.cells_min, spec.donors_min) == (4, 2)
    np.testing.assert_array_equal(sums["confusion"], confusion_matrix(truth, logits.argmax(axis=1), labels=[0, 1]))
    at = spec.temperatures.index(1.0)
    found = compute_log_probabilities(logits, 1.0)[np.arange(len(truth)), truth]
    assert sums["negative_log_likelihood"][at] == pytest.approx(-found.sum(), rel=1e-5)


def test_card_of_a_model_of_donors(trained: Trained) -> None:
    card = read_model_folder(trained.folder).card
    logits, truth = load_validation(trained)
    assert card.task == "donor" and card.evaluation is not None and card.evaluation.cells == 12
    assert card.evaluation.macro_f1 == pytest.approx(f1_score(truth, logits.argmax(axis=1), average="macro"))
    assert [row.cells_train for row in card.sites] == [24, 24, 24]
    text = (trained.folder / "model-card.md").read_text()
    for words in ("a bag of its cells", "gated attention", "12 validation samples",
                  "| label | F1 | samples (support) |", "AUROC at the sites", "8 cells of each",
                  "one more right or wrong call", "attention shows where the model looked, not why"):
        assert words in text
    assert "None" not in text and "single cell" not in text
    for picture in re.findall(r"\]\(([^)]+)\)", text):
        assert (trained.folder / picture).stat().st_size > 1000


def test_compare_of_donors_draws_donors(trained: Trained) -> None:
    site = trained.consortium.sites[1]
    said = json.loads(run_command("run", "compare", TRAINING, "--site", site.toml, "--json"))
    assert (said["samples"], said["score"], said["site"]) == (4, "auroc", "East")
    config, store = read_site_config(site.toml), trained.consortium.store
    checkpoint = read_checkpoint(store, trained.view.checkpoint, trained.spec)
    data = load_site_data(config, trained.spec)
    examples = prepare_validation(data, trained.spec, checkpoint)
    truth, network = examples.y.numpy(), build_model(trained.spec)
    load_state(network, checkpoint)
    area = roc_auc_score(truth, examples.predict(network, examples.validation)[:, 1])
    assert said["auroc"]["swarm"] == pytest.approx(area)
    assert said["difference"] == pytest.approx(said["auroc"]["swarm"] - said["auroc"]["home"])
    assert said["interval"][0] <= said["difference"] <= said["interval"][1]
    even = compare_site(config, store, trained.view, trained.spec, site=1, train=lambda *_, **__: checkpoint)
    assert (even.difference, even.low, even.high) == (0.0, 0.0, 0.0)
    words = run_command("run", "compare", TRAINING, "--site", site.toml)
    assert "AUROC" in words and "bootstrap over the donors" in words


@pytest.mark.parametrize(("change", "words"), [
    ({"donors_min": 5}, "North has 2 validation donors, the evaluation needs 5"),
    ({}, "North has 4 validation samples, the evaluation needs 5"),
])
def test_invalid_evaluation_over_few_donors(trained: Trained, change: dict[str, Any], words: str) -> None:
    plan = plan_evaluation(trained.spec, trained.view, name="e", cells_min=2 if change else None, **change)
    store = trained.consortium.store
    view = RunView(**{**vars(trained.view), "run": 99, "spec": store.put_blob(encode_canonical(plan))})
    with pytest.raises(DataError, match=words):
        check_run(read_site_config(trained.consortium.sites[0].toml), store, view, site=0,
                  view_run=trained.consortium.contract.view_run)


def test_predict_calls_samples_and_says_which_cells_carried_them(trained: Trained, tmp_path: Path) -> None:
    said = json.loads(run_command(
        "predict", trained.folder, trained.new, *COLUMNS, "--cell-type-column", "kind", "--truth", "condition",
        "--out", tmp_path / "a.h5ad", "--samples-out", tmp_path / "s.csv", "--plots", tmp_path / "p", "--batch", 31,
        "--json"))
    before, after = anndata.read_h5ad(trained.new), anndata.read_h5ad(tmp_path / "a.h5ad")
    folder = read_model_folder(trained.folder)
    names, of = np.unique(before.obs["sample"].astype(str), return_inverse=True)
    counts = np.asarray(before.X)
    x = standardize(np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4).astype(np.float32),
                    np.ones(FEATURES, bool), folder.tensors)
    for i, name in enumerate(names):
        here = of == i
        weights = compute_attention(folder.tensors, x[here], trained.spec)
        np.testing.assert_allclose(after.obs["swarm_attention"][here], weights, rtol=1e-3, atol=1e-6)
        assert after.obs["swarm_attention"][here].sum() == pytest.approx(1, abs=1e-5)
        row = said["samples"][i]
        assert row["sample"] == name and row["donor"] == name.split("/")[0] and row["cells"] == here.sum()
        assert set(after.obs["swarm_label"][here]) == {row["label"]}
        for kind, share in row["attention"].items():
            expected = weights[(before.obs["kind"] == kind).to_numpy()[here]].sum()
            assert share == pytest.approx(expected, abs=1e-4)
    network = build_model(trained.spec)
    load_state(network, folder.tensors)
    logits = np.concatenate([np.log(predict_bags(folder.tensors, x[of == i], np.zeros((of == i).sum(), int),
                                                 trained.spec)) for i in range(len(names))])
    expected = np.exp(compute_log_probabilities(logits, folder.temperature))
    np.testing.assert_allclose([list(row["probabilities"].values()) for row in said["samples"]], expected, atol=1e-4)
    np.testing.assert_allclose(after.obsm["swarm_probabilities"], expected[of], atol=1e-4)
    assert after.obs_names.equals(before.obs_names) and np.array_equal(after.X, before.X)
    about = after.uns["swarmchain"]["samples"]
    assert list(about["sample"]) == names.tolist() and about["attention"].shape == (len(names), 2)
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["sample"] for row in rows] == names.tolist()
    for row, told in zip(rows, said["samples"], strict=True):
        assert row["label"] == told["label"]
        assert float(row["attention:resting"]) == pytest.approx(told["attention"]["resting"], abs=1e-6)
    truth = np.array([name.endswith("stim") for name in names])
    assert said["truth"]["samples"] == len(names)
    assert said["truth"]["auroc"] == pytest.approx(roc_auc_score(truth, expected[:, 1]))
    assert said["cells"] == before.n_obs and sum(row["samples"] for row in said["labels"].values()) == len(names)
    drawn = {Path(name).name for name in said["plots"]}
    assert {"umap-attention.png", "attention.png", "confusion.png", "umap-right.svg"} <= drawn
    words = run_command("predict", trained.folder, trained.new, *COLUMNS, "--cell-type-column", "kind", "--out",
                        tmp_path / "b.h5ad")
    assert f"{names[0]}  " in words and "responding" in words


# -- pooled as it comes


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 20), st.sampled_from(SETS))
def test_pooling_in_batches_is_the_network_on_whole_bags(seed: int, cells: int, batch: int, model: Any) -> None:
    spec, g = make_spec(model=model), np.random.default_rng(seed)
    x = (g.normal(size=(cells, FEATURES)) * 30).astype(np.float32)
    _, bag = np.unique(g.integers(0, 4, size=cells), return_inverse=True)
    state = draw_state(spec)
    network = build_model(spec).eval()
    assert isinstance(network, SetNetwork)
    load_state(network, state)
    pooling = Pooling(network, bag.max() + 1)
    scores = np.concatenate([pooling.add(x[i : i + batch], bag[i : i + batch]) for i in range(0, cells, batch)])
    found = np.exp(compute_log_probabilities(pooling.compute_logits(), 1.0))
    np.testing.assert_allclose(found, predict_bags(state, x, bag, spec), atol=2e-4)
    if isinstance(model, GatedAttention):
        weights = pooling.compute_attention(scores, bag)
        for i in range(bag.max() + 1):
            np.testing.assert_allclose(weights[bag == i], compute_attention(state, x[bag == i], spec), atol=1e-4)


def test_validation_examples_know_their_donors() -> None:
    spec = make_spec()
    data = select_cells(make_cells(donors=14), spec)
    examples, whole = (make(data, spec, make_constants(spec), *more) for make, more in (
        (prepare_validation, ()), (prepare_training, (np.array([8, 8]),))))
    assert isinstance(examples, BagSet) and isinstance(whole, BagSet)
    assert examples.y.tolist() == whole.y[whole.validation].tolist()
    for i, sample in enumerate(whole.validation):
        assert np.array_equal(examples.get_bag(i), whole.get_bag(int(sample)))
    owners = list_owners(data, examples)
    assert len(np.unique(owners)) == 2 and len(owners) == 4
    with pytest.raises(DataError, match="no validation"):
        prepare_validation(select_cells(make_cells(donors=2), spec), spec, make_constants(spec))


# -- a model folder made by hand


def make_folder(folder: Path, *, normalization: Normalization | None = None, **changes: Any) -> DonorSpec:
    spec, zero = make_spec(**changes).model_copy(update={"normalization": normalization or Normalization()}), "0" * 64
    layout = checkpoint_layout(spec)
    tensors = {name: np.zeros(shape, dtype) for name, (dtype, shape) in layout.items()}
    tensors |= {**draw_state(spec), **make_constants(spec), "standardize.mean": np.full(FEATURES, 5, np.float32)}
    files = {"model.safetensors": encode_tensors(tensors, layout), "spec.json": encode_canonical(spec)}
    digests = {name: compute_digest(data) for name, data in files.items()}
    record = Provenance(chain_id=1, contract="0x" + "0" * 40, run=1, round=1, spec=digests["spec.json"],
                        checkpoint=digests["model.safetensors"], manifest=zero, head=zero, code="c")
    card = ModelCard(name="m", task="donor", version="0", provenance=record, files=digests, sites=(), rounds=(),
                     evaluation=None)
    for name, data in {**files, "model.json": encode_canonical(card)}.items():
        write_file(folder / name, data)
    return spec


def test_predict_reads_zarr_and_tables(tmp_path: Path) -> None:
    """The same calls, under the same names, whatever the format."""
    make_folder(tmp_path / "m")
    path = write_new(tmp_path / "new.h5ad")
    data = anndata.read_h5ad(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on zarr's next format
        data.write_zarr(tmp_path / "new.zarr")
    table = data.to_df().join(data.obs[["donor", "sample", "kind"]])
    table["donor"] = table["donor"].astype("category").cat.codes  # numbers: no feature, for all that
    table.to_csv(tmp_path / "new.csv")
    found = {}
    for name in ("new.h5ad", "new.zarr", "new.csv"):
        run_command("predict", tmp_path / "m", tmp_path / name, *COLUMNS, "--cell-type-column", "kind", "--out",
                    tmp_path / f"{name}.out.h5ad")
        found[name] = anndata.read_h5ad(tmp_path / f"{name}.out.h5ad")
    for other in (found["new.zarr"], found["new.csv"]):
        assert other.obs_names.tolist() == data.obs_names.tolist()
        assert other.var_names.tolist() == data.var_names.tolist()
        np.testing.assert_array_equal(np.asarray(other.X), np.asarray(data.X))
        np.testing.assert_allclose(other.obsm["swarm_probabilities"], found["new.h5ad"].obsm["swarm_probabilities"],
                                   atol=1e-5)
        assert other.obs["sample"].astype(str).tolist() == data.obs["sample"].astype(str).tolist()
    again = run_command("predict", tmp_path / "m", tmp_path / "new.csv.out.h5ad", *COLUMNS, "--out", tmp_path / "x",
                        code=1)
    assert "has .obs['swarm_label'] already" in again


def test_predict_reads_a_folder_of_fcs_files(tmp_path: Path) -> None:
    """A file is a donor; events keep their names and, linear as they are, their values."""
    make_folder(tmp_path / "m", normalization=Normalization(kind="arcsinh", cofactor=150))
    (tmp_path / "fcs").mkdir()
    channels, antigens = tuple(f"C{i}" for i in range(FEATURES)), tuple(f"g{i}" for i in range(FEATURES))
    values = [write_fcs(tmp_path / "fcs" / f"{name}.fcs", events=n, seed=n, spill=None, channels=channels,
                        antigens=antigens) for name, n in (("ann", 20), ("bob", 31))]
    said = json.loads(run_command("predict", tmp_path / "m", tmp_path / "fcs", "--out", tmp_path / "a.h5ad", "--json"))
    data = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert [(row["sample"], row["donor"], row["cells"]) for row in said["samples"]] == [("ann", "ann", 20),
                                                                                        ("bob", "bob", 31)]
    np.testing.assert_array_equal(np.asarray(data.X), np.concatenate(values))
    assert data.var_names.tolist() == list(antigens) and data.var["channel"].tolist() == list(channels)
    assert data.obs_names.is_unique and data.obs_names[0].startswith("ann")
    assert data.obs.groupby("file", observed=True)["swarm_attention"].sum().tolist() == pytest.approx([1, 1], abs=1e-5)


def test_predict_reads_a_10x_folder(tmp_path: Path) -> None:
    make_folder(tmp_path / "m", model=RowModel())
    data = anndata.read_h5ad(write_new(tmp_path / "new.h5ad"))
    folder = tmp_path / "10x"
    folder.mkdir()
    mmwrite(folder / "matrix.mtx", sp.coo_matrix(np.asarray(data.X).T.astype(int)))
    (folder / "barcodes.tsv").write_text("".join(f"{name}\n" for name in data.obs_names))
    (folder / "genes.tsv").write_text("".join(f"ENSG{i}\t{name}\n" for i, name in enumerate(data.var_names)))
    for path in (folder, tmp_path / "new.h5ad"):
        run_command("predict", tmp_path / "m", path, "--out", tmp_path / f"{path.stem}-a.h5ad")
    a, b = (anndata.read_h5ad(tmp_path / f"{name}-a.h5ad") for name in ("10x", "new"))
    assert a.obs_names.equals(b.obs_names) and a.var["gene_ids"].tolist()[0] == "ENSG0"
    np.testing.assert_allclose(a.obsm["swarm_probabilities"], b.obsm["swarm_probabilities"], atol=1e-5)
    np.testing.assert_array_equal(a.X.toarray(), np.asarray(b.X))


def test_predict_of_rows_needs_no_columns(tmp_path: Path) -> None:
    spec = make_folder(tmp_path / "m", model=RowModel(hidden=(4,)))
    path = write_new(tmp_path / "new.h5ad")
    said = json.loads(run_command("predict", tmp_path / "m", path, "--out", tmp_path / "a.h5ad", "--samples-out",
                                  tmp_path / "s.csv", "--json"))
    data = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert [row["sample"] for row in said["samples"]] == data.obs_names.tolist()
    assert "swarm_attention" not in data.obs and list(said["samples"][0]["probabilities"]) == list(spec.labels)
    head = (tmp_path / "s.csv").read_text().splitlines()[0]
    assert head == "sample,donor,cells,label,confidence,unknown,probability:control,probability:stim"


@pytest.mark.parametrize(("words", "message"), [
    ((), "nothing tells whose cells are whose"),
    (("--donor-column", "nope"), "has no column 'nope' in .obs"),
    (("--donor-column", "donor", "--sample-column", "half"), "has two donors"),
    (("--donor-column", "gap"), "cells have no 'gap'"),
    ((*COLUMNS, "--cell-type-column", "nope"), "has no column 'nope'"),
    ((*COLUMNS, "--truth", "kind"), "has two labels in column 'kind'"),
    (("--donor-column", "donor", "--truth", "condition"), "has two labels in column 'condition'"),
])
def test_invalid_columns(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    make_folder(tmp_path / "m")
    path = write_new(tmp_path / "new.h5ad")
    data = anndata.read_h5ad(path)
    data.obs["half"] = np.where(np.arange(data.n_obs) % 2, "a", "b")
    data.obs["gap"] = np.where(np.arange(data.n_obs) % 2, "a", "")
    data.write_h5ad(path)
    said = run_command("predict", tmp_path / "m", path, *words, "--out", tmp_path / "a.h5ad", code=1)
    assert message in said and str(path) in said and not (tmp_path / "a.h5ad").exists()


def test_invalid_sample_without_a_cell_on_the_panel(tmp_path: Path) -> None:
    make_folder(tmp_path / "m")
    path = write_new(tmp_path / "new.h5ad")
    data = anndata.read_h5ad(path)
    other = anndata.AnnData(np.ones((data.n_obs, 1), np.float32), obs=data.obs[[]])
    other.var_names = ["elsewhere"]
    joined = anndata.concat([data, other], axis=1, merge="first")
    joined.X[(joined.obs["sample"] == "s9d02/stim").to_numpy(), :FEATURES] = 0
    joined.write_h5ad(path)
    said = run_command("predict", tmp_path / "m", path, *COLUMNS, "--out", tmp_path / "a.h5ad", code=1)
    assert "sample 's9d02/stim' has no cell with a value other than 0 on the model's panel" in said


def test_invalid_attention_of_a_model_without(tmp_path: Path) -> None:
    make_folder(tmp_path / "m", model=SETS[2])
    path = write_new(tmp_path / "new.h5ad")
    said = run_command("predict", tmp_path / "m", path, *COLUMNS, "--cell-type-column", "kind", "--out", tmp_path / "a",
                       code=1)
    assert "a model of kind deep_sets has no attention to sum" in said
    run_command("predict", tmp_path / "m", path, *COLUMNS, "--out", tmp_path / "a.h5ad")
    assert "swarm_attention" not in anndata.read_h5ad(tmp_path / "a.h5ad").obs


def test_invalid_evaluation_of_what_trained_no_model(trained: Trained) -> None:
    plan = plan_evaluation(trained.spec, trained.view, name="e")
    consortium = trained.consortium
    first = consortium.contract.view_run(STATISTICS)
    plan = plan.model_copy(update={"trained": RunRef(run=STATISTICS, spec=first.spec, checkpoint=first.checkpoint)})
    view = RunView(**{**vars(trained.view), "run": 99, "spec": consortium.store.put_blob(encode_canonical(plan))})
    with pytest.raises(SpecError, match="trained no model"):
        check_run(read_site_config(consortium.sites[0].toml), consortium.store, view, site=0,
                  view_run=consortium.contract.view_run)
