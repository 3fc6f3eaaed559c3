"""Classifiers of donors: rows and bags of cells, the split by donor, and a swarm of them on a real chain."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from swarmchain.agreement import compute_statistics
from swarmchain.baselines import pool, train_alone
from swarmchain.baselines_donors import compare_donors, load_test, predict_samples, summarize_arm
from swarmchain.checkpoint import allocate_tensors, compute_size, decode_tensors
from swarmchain.config import DataConfig, read_site_config
from swarmchain.consortium import start_consortium
from swarmchain.data import load_site_data, read_cells
from swarmchain.dealing_donors import AML_FOLDS, KANG_FOLDS, deal_aml, deal_kang
from swarmchain.donors import check_donor_split, choose_validation_donors, group_samples
from swarmchain.errors import DataError, SpecError
from swarmchain.examples import BagSet, TrainingSet, predict_bags
from swarmchain.layouts import checkpoint_layout, constant_layout, state_layout
from swarmchain.merge import Input, compute_norm, merge_deltas
from swarmchain.metrics import compute_auroc
from swarmchain.model import build_model, compute_attention, draw_state, load_state, sum_attention
from swarmchain.planning import plan_donor, plan_statistics, read_statistics
from swarmchain.selection import Cells, SiteData, select_cells
from swarmchain.spec import (
    DeepSets,
    DonorSpec,
    GatedAttention,
    Limits,
    Normalization,
    Panel,
    Pseudobulk,
    RowModel,
    StatisticsRef,
    Training,
    encode_spec,
    parse_spec,
)
from swarmchain.store import read_checkpoint
from swarmchain.trainer import Resume, compute_loss, prepare_training, score_checkpoint, train_round

DATA = Path(os.environ.get("SWARMCHAIN_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "splits").is_dir(),
                                reason="SWARMCHAIN_DATA does not name the folder with the real data")
SETS = (Pseudobulk(), Pseudobulk(hidden=(5,)), DeepSets(encoder=(6, 4), hidden=(5,), dropout=0.2),
        GatedAttention(encoder=(6,), attention=3))
FEATURES = 5


def make_spec(**changes: Any) -> DonorSpec:
    given = {"model": GatedAttention(encoder=(6,), attention=3), "training": Training(steps=8, batch_size=4),
             "bag_size": 7, **changes}
    return DonorSpec(
        name="t", panel=Panel(features=tuple(f"g{i}" for i in range(FEATURES))), labels=("control", "stim"),
        limits=Limits(rounds=3, sites_to_start=2), normalization=Normalization(kind="none"),
        statistics=StatisticsRef(run=1, spec="0" * 64, checkpoint="0" * 64), seed_checkpoint="0" * 64, **given)


def make_cells(seed: int = 0, donors: int = 8, cells: int = 12) -> Cells:
    """Every donor under both conditions; most cells of a stimulated sample show it."""
    g = np.random.default_rng(seed)
    donor = np.repeat(np.arange(donors), 2 * cells)
    stim = np.tile(np.repeat([0, 1], cells), donors)
    x = g.normal(size=(len(donor), FEATURES)) + g.normal(size=(donors, 1))[donor] / 4
    x[:, 1] += 5.0 * stim * (g.random(len(donor)) < 0.7)
    labels, names = np.array(["control", "stim"])[stim], np.array([f"s{seed}d{d:02d}" for d in donor])
    return Cells(x=x.astype(np.float32), features=tuple(f"g{i}" for i in range(FEATURES)), labels=labels,
                 names=np.array([f"{seed}-{i}" for i in range(len(donor))]), source="cells.h5ad", donors=names,
                 samples=np.array([f"{d}/{label}" for d, label in zip(names, labels, strict=True)]))


def make_constants(spec: DonorSpec) -> dict[str, Any]:
    return {name: np.full(shape, float("scale" in name), dtype)
            for name, (dtype, shape) in constant_layout(spec).items()}


def make_examples(spec: DonorSpec, cells: Cells | None = None) -> TrainingSet | BagSet:
    return prepare_training(select_cells(cells or make_cells(), spec), spec, make_constants(spec), np.array([8, 8]))


# -- networks


@pytest.mark.parametrize("model", SETS, ids=lambda m: f"{m.kind}{m.hidden}")
def test_network_has_the_layout_of_its_spec(model: Any) -> None:
    spec = make_spec(model=model)
    network = build_model(spec)
    load_state(network, draw_state(spec))
    found = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert found == {name: shape for name, (_, shape) in state_layout(spec).items()}
    assert parse_spec(encode_spec(spec)) == spec


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from(SETS))
def test_order_of_cells_changes_nothing(seed: int, count: int, model: Any) -> None:
    spec, g = make_spec(model=model), np.random.default_rng(seed)
    bag, order = g.normal(size=(count, FEATURES)).astype(np.float32), g.permutation(count)
    state = draw_state(spec)
    network = build_model(spec).eval()
    load_state(network, state)
    with torch.no_grad():
        one, other = network(torch.tensor(bag)[None]), network(torch.tensor(bag[order])[None])
    assert torch.allclose(one, other, atol=1e-5)
    if isinstance(model, GatedAttention):
        weights = compute_attention(state, bag, spec)
        assert np.allclose(weights[order], compute_attention(state, bag[order], spec), atol=1e-6)
        assert np.isclose(weights.sum(), 1.0, atol=1e-5)


def test_prediction_without_labels_is_that_with_them() -> None:
    spec = make_spec()
    examples, state = make_examples(spec), draw_state(spec)
    assert isinstance(examples, BagSet)
    data = select_cells(make_cells(), spec)
    found = predict_bags(state, examples.x.numpy(), data.samples, spec)
    assert found.shape == (len(data.sample_names), 2)
    assert np.array_equal(found[examples.validation], predict_samples(state, examples, spec))
    with pytest.raises(DataError, match="no samples"):
        predict_bags(state, np.zeros((0, FEATURES), np.float32), np.zeros(0, np.int64), spec)


def test_attention_is_that_of_the_paper() -> None:
    spec = make_spec()
    state, bag = draw_state(spec), np.random.default_rng(1).normal(size=(9, FEATURES)).astype(np.float32)
    h = np.maximum(bag @ state["encoder.0.weight"].T + state["encoder.0.bias"], 0)
    content = np.tanh(h @ state["attention.content.weight"].T + state["attention.content.bias"])
    gate = 1 / (1 + np.exp(-(h @ state["attention.gate.weight"].T + state["attention.gate.bias"])))
    e = np.exp((content * gate) @ state["attention.score.weight"][0] + state["attention.score.bias"][0])
    weights = compute_attention(state, bag, spec)
    assert np.allclose(weights, e / e.sum(), atol=1e-6)
    kinds = np.array(["B", "T", "T"] * 3)
    totals = sum_attention(weights, kinds)
    assert np.isclose(sum(totals.values()), 1.0, atol=1e-5)
    assert np.isclose(totals["B"], weights[kinds == "B"].sum(), atol=1e-6)
    assert list(totals.values()) == sorted(totals.values(), reverse=True)


def test_invalid_attention() -> None:
    spec = make_spec(model=DeepSets(encoder=(4,)))
    with pytest.raises(SpecError, match="deep_sets has no attention"):
        compute_attention(draw_state(spec), np.zeros((3, FEATURES), np.float32), spec)
    spec = make_spec()
    with pytest.raises(DataError, match="empty bag"):
        compute_attention(draw_state(spec), np.zeros((0, FEATURES), np.float32), spec)


# -- whose cells, and the split


@st.composite
def owned(draw: Any) -> tuple[Any, Any, Any]:
    """Label, donor and sample of every row: a sample is a donor under one label."""
    count = draw(st.integers(1, 40))
    donors = np.array(draw(st.lists(st.sampled_from([f"d{i}" for i in range(9)]), min_size=count, max_size=count)))
    y = np.array(draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    return y, donors, np.array([f"{d}/{label}" for d, label in zip(donors, y, strict=True)])


@given(owned(), st.floats(0.01, 0.99), st.randoms())
def test_split_is_by_donor_and_leaves_every_label_donors(rows: Any, share: float, random: Any) -> None:
    y, donors, names = rows
    samples = group_samples(y, donors, names, source="x")
    chosen = choose_validation_donors(samples, share=share)
    held = np.isin(samples.donor[samples.of_row], chosen)
    assert not set(donors[held]) & set(donors[~held])
    assert set(y[~held]) == set(y)
    for label in np.unique(y):
        carriers = {d for d, v in zip(donors, y, strict=True) if v == label}
        assert len(carriers & set(donors[held])) <= len(carriers) * share
    order = list(range(len(y)))
    random.shuffle(order)
    again = group_samples(y[order], donors[order], names[order], source="x")
    assert np.array_equal(choose_validation_donors(again, share=share), chosen)
    assert again.names == samples.names and np.array_equal(again.of_row, samples.of_row[order])


def test_donors_of_one_label_each_are_held_out_as_cells_are() -> None:
    y = np.arange(40) % 2
    names = np.array([f"d{i}" for i in range(40)])
    samples = group_samples(y, names, names, source="x")
    chosen = choose_validation_donors(samples, share=0.15)
    assert np.array_equal(np.bincount(samples.y[chosen]), [3, 3])


@pytest.mark.parametrize(("change", "words"), [
    ({"samples": None}, "two labels"), ({"donors": None}, "splits by donor"),
    ({"samples": np.tile(["a", "b"], 96)}, "two labels"),
])
def test_invalid_owners(change: dict[str, Any], words: str) -> None:
    from dataclasses import replace

    with pytest.raises(DataError, match=words):
        select_cells(replace(make_cells(), **change), make_spec())


def test_invalid_sample_of_two_donors() -> None:
    with pytest.raises(DataError, match="'s' has two donors"):
        group_samples(np.zeros(2, int), np.array(["a", "b"]), np.array(["s", "s"]), source="x")


def test_invalid_one_class_only_and_donor_in_both_splits() -> None:
    cells = make_cells()
    keep = cells.labels == "stim"
    one = Cells(x=cells.x[keep], features=cells.features, labels=cells.labels[keep], names=cells.names[keep],
                source="one.h5ad", donors=cells.donors[keep], samples=cells.samples[keep])
    with pytest.raises(DataError, match=r"one\.h5ad: all donors to train on have the label 'stim'"):
        select_cells(one, make_spec())
    assert len(select_cells(one, make_spec(labels_min=1)).train)
    with pytest.raises(DataError, match=r"splits\.csv: a donor in both splits: 'b'"):
        check_donor_split(["a", "b"], ["b", "c"], source="splits.csv")
    check_donor_split(["a", "b"], ["c"], source="splits.csv")


def test_invalid_empty_bag() -> None:
    data = select_cells(make_cells(), make_spec())
    spoilt = SiteData(x=data.x, y=data.y, present=data.present, train=data.train, validation=data.validation,
                      donors=data.donors, samples=data.samples, sample_names=(*data.sample_names, "nobody"))
    with pytest.raises(DataError, match="empty bag"):
        prepare_training(spoilt, make_spec(), make_constants(make_spec()), np.array([8, 8]))


def test_invalid_score_for_three_labels() -> None:
    spec = make_spec()
    changed = json.loads(encode_spec(spec)) | {"labels": ["a", "b", "c"], "score": "auroc"}
    with pytest.raises(SpecError, match="auroc is for 2 labels"):
        parse_spec(json.dumps(changed).encode())


def test_statistics_count_training_samples() -> None:
    data = select_cells(make_cells(), make_spec())
    sums = compute_statistics(data, make_spec())
    assert sums["samples_per_label"].tolist() == [7, 7]
    assert sums["cells_per_label"].tolist() == [84, 84]


# -- training


@pytest.mark.parametrize("model", [*SETS, RowModel(hidden=(8,))], ids=lambda m: f"{m.kind}{m.hidden}")
def test_interrupted_training_on_donors_gives_the_same_bytes(tmp_path: Path, model: Any) -> None:
    spec = make_spec(model=model)
    examples, parent = make_examples(spec), draw_state(spec)
    whole = train_round(parent, examples, spec, round_id=1, site=0)

    class Stop(Exception):
        pass

    ticks = iter(range(100))

    def clock() -> float:
        if (tick := next(ticks)) == 9:
            raise Stop
        return float(tick)

    with pytest.raises(Stop):
        train_round(parent, examples, spec, round_id=1, site=0, resume=Resume(tmp_path, 2.0, "ab" * 32, clock))
    assert (tmp_path / "training.npz").exists()
    torch.manual_seed(7)
    again = train_round(parent, make_examples(spec), spec, round_id=1, site=0, resume=Resume(tmp_path, 1e9, "ab" * 32))
    assert {n: d.tobytes() for n, d in again.deltas.items()} == {n: d.tobytes() for n, d in whole.deltas.items()}
    assert whole.samples == (14 if not isinstance(model, RowModel) else 168)


def test_bags_hold_cells_of_their_sample_alone() -> None:
    spec = make_spec(bag_size=20)  # more than a sample has: drawn with replacement
    examples = make_examples(spec)
    assert isinstance(examples, BagSet)
    batches = examples.sample(np.random.default_rng(0), 3, 4)
    for batch in batches:
        inputs, labels = examples.take(batch)
        assert inputs.shape == (4, 20, FEATURES)
        for bag, label, sample in zip(inputs.numpy(), labels.tolist(), batch[:-1].tolist(), strict=True):
            assert sample in examples.train
            own = {row.tobytes() for row in examples.get_bag(sample)}
            assert {row.tobytes() for row in bag} <= own
            assert label == int(examples.y[sample])
    assert examples.take(batches[0])[0].equal(examples.take(batches[0])[0])


def test_proximal_term_keeps_the_network_near_its_parent() -> None:
    """Against the gradient that PyTorch derives from the loss with μ/2 · ‖w - parent‖² in it."""
    free, bound = make_spec(), make_spec(training=Training(steps=8, batch_size=4, proximal=2.0))
    examples, parent = make_examples(free), draw_state(free)
    moved = {s.training.proximal: train_round(parent, examples, s, round_id=1, site=0).deltas for s in (free, bound)}
    assert compute_norm(moved[2.0]) < compute_norm(moved[0.0])

    model = build_model(bound)
    load_state(model, parent)
    from swarmchain.protocol import derive_seed

    optimizer = torch.optim.Adam(model.parameters(), lr=bound.training.lr)
    for batch in examples.sample(np.random.default_rng(derive_seed("train", 0, 1, 0)), 8, 4):
        inputs, labels = examples.take(batch)
        near = sum(((p - torch.tensor(parent[n])) ** 2).sum() for n, p in model.named_parameters())
        optimizer.zero_grad()
        (torch.nn.functional.cross_entropy(model(inputs), labels) + near).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert np.allclose(value.numpy() - parent[name], moved[2.0][name], atol=1e-5)


def test_score_and_loss_on_validation_donors() -> None:
    spec = make_spec(score="auroc")
    examples = make_examples(spec)
    state = draw_state(spec)
    chances = predict_samples(state, examples, spec)
    truth = examples.y.numpy()[examples.validation]
    assert score_checkpoint(state, examples, spec) == roc_auc_score(truth, chances[:, 1])
    loss = compute_loss(state, examples, spec)
    assert loss is not None and np.isclose(loss, -np.log(chances[np.arange(len(truth)), truth]).mean(), rtol=1e-5)
    few = make_examples(spec, make_cells(donors=2))
    assert len(few.validation) == 0
    assert (score_checkpoint(state, few, spec), compute_loss(state, few, spec)) == (None, None)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(-5, 5)), min_size=1, max_size=60))
def test_auroc_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    truth, scores = np.array([p[0] for p in pairs]), np.array([p[1] / 3 for p in pairs])
    found = compute_auroc(truth, scores)
    if len(set(truth.tolist())) == 1:
        assert np.isnan(found)
    else:
        assert np.isclose(found, roc_auc_score(truth, scores), atol=1e-12)


def test_pooling_keeps_donors_of_two_sites_apart() -> None:
    spec = make_spec()
    parts = [select_cells(make_cells(), spec), select_cells(make_cells(), spec)]  # the same names at both
    pooled = pool(parts, make_constants(spec))
    assert len(np.unique(pooled.donors)) == 16 and len(pooled.sample_names) == 32
    assert not set(pooled.donors[pooled.train]) & set(pooled.donors[pooled.validation])
    state = train_alone(pooled, {**draw_state(spec), **make_constants(spec)}, spec, site=0, rounds=2)
    assert set(state) == set(state_layout(spec))


# -- a swarm


def write_site(path: Path, cells: Cells) -> Path:
    obs = pd.DataFrame({"condition": cells.labels, "donor": cells.donors, "sample": cells.samples}, index=cells.names)
    counts = np.rint(10 * np.exp(np.clip(cells.x, -3, 8))).astype(np.float32)
    anndata.AnnData(X=counts, obs=obs, var=pd.DataFrame(index=list(cells.features))).write_h5ad(path)
    return path


def test_swarm_on_bags_is_what_merging_in_one_process_gives(tmp_path: Path) -> None:
    """Three sites as processes on a real chain: statistics by donor, then attention on bags of cells."""
    files = {f"Site {i}": write_site(tmp_path / f"{i}.h5ad", make_cells(i)) for i in range(3)}
    with start_consortium(tmp_path / "swarm", files, seed=0, label_column="condition", donor_column="donor",
                          sample_column="sample") as swarm:
        cards = [s.card for s in swarm.sites]
        source = plan_statistics(cards, name="s", sites_to_start=3, split_by="donor")
        first = swarm.propose(source)
        with pytest.raises(SpecError, match="validation donors too"):
            plan_donor((plan_statistics(cards, name="s", sites_to_start=3), {}), swarm.contract.view_run(first),
                       model=Pseudobulk())
        swarm.start_agents([first, first + 1])
        swarm.follow(lambda *_: None, until=lambda: swarm.contract.view_run(first).finalized_round > 0, timeout_s=120)
        view = swarm.contract.view_run(first)
        statistics = read_statistics(swarm.store, view)
        assert statistics[1]["samples_per_label"].tolist() == [21, 21]
        spec, blob = plan_donor(statistics, view, name="d", model=GatedAttention(encoder=(8,), attention=4),
                                bag_size=8, limits=Limits(rounds=4, sites_to_start=3), sites_per_feature_min=3,
                                training=Training(steps=15, batch_size=8, lr=0.01))
        assert spec.score == "auroc"
        swarm.store.put_blob(blob)
        run = swarm.propose(spec)
        events: list[Any] = []
        swarm.follow(lambda site, event: events.append((site, event)), timeout_s=180)
        final = swarm.contract.view_run(run)
        assert final.finalized_round == 4
        data = {s.name: load_site_data(read_site_config(s.toml), spec) for s in swarm.sites}
        tensors = read_checkpoint(swarm.store, final.checkpoint, spec)
        seed = decode_tensors(blob, checkpoint_layout(spec))
        assert swarm.store.get_blob(final.checkpoint, bytes_max=compute_size(checkpoint_layout(spec))) == \
            play(spec, seed, data, statistics[1]["samples_per_label"])
        told = [e for _, e in events if e["event"] == "run" and e["run"] == run]
        assert all("samples_train" in json.dumps(e) for e in told) and told
    config = DataConfig(path="", label_column="condition", donor_column="donor", sample_column="sample")
    test = load_test({"new": write_site(tmp_path / "new.h5ad", make_cells(9))}, config, seed, spec)
    arms = compare_donors(tensors, seed, data, test, spec)
    truth = test.y.numpy()[test.validation]
    scores = {name: summarize_arm(truth, chances, spec)["auroc"] for name, chances in arms.items()}
    assert scores["swarm"] >= 0.95, scores
    assert {"central", "linear", "local Site 0"} < set(scores)


def play(spec: DonorSpec, seed: Any, data: dict[str, SiteData], counts: Any) -> bytes:
    """The same run without chain and store."""
    torch.set_num_threads(1)
    layout = checkpoint_layout(spec)
    examples = [prepare_training(part, spec, seed, counts) for part in data.values()]
    blob, parent = allocate_tensors(layout)
    for name, value in seed.items():
        parent[name][...] = value
    for round_id in range(1, spec.limits.rounds + 1):
        made = [train_round(parent, own, spec, round_id=round_id, site=i) for i, own in enumerate(examples)]
        blob, into = allocate_tensors(layout)
        merge_deltas(parent, [Input(i, m.samples, m.deltas, compute_norm(m.deltas)) for i, m in enumerate(made)],
                     spec.merge, into=into)
        parent = into
    return bytes(blob)


# -- real data


@needs_data
def test_aml_is_dealt_by_the_fixed_splits(tmp_path: Path) -> None:
    for fold, skew, most in ((0, True, 20), (AML_FOLDS - 1, False, 9)):
        dealt = deal_aml(tmp_path / str(fold), DATA, fold, skew=skew)
        sites = [anndata.read_h5ad(path).obs for path in dealt.files.values()]
        test = anndata.read_h5ad(dealt.test["held out"]).obs
        assert (len(sites), sum(map(len, sites)) + len(test)) == (5, 359)
        assert not {s for obs in sites for s in obs["subject"]} & set(test["subject"])
        assert max(int((obs["diagnosis"] == "aml").sum()) for obs in sites) == most


@needs_data
def test_kang_attention_tells_the_condition_of_donors_nobody_trained_on(tmp_path: Path) -> None:
    dealt = deal_kang(tmp_path / "d", DATA, KANG_FOLDS - 1)
    assert len(dealt.files) == 3
    with pytest.raises(DataError, match="cannot read"):
        deal_kang(tmp_path / "e", tmp_path, 0)
    config = DataConfig(path="", label_column=dealt.label_column, donor_column=dealt.donor_column,
                        sample_column=dealt.sample_column)
    cells = read_cells(next(iter(dealt.files.values())), config, Normalization())
    panel = tuple(sorted(cells.features[i] for i in np.argsort(-np.asarray(cells.x.sum(axis=0)).ravel())[:300]))
    spec = make_spec(model=GatedAttention(encoder=(16,), attention=8), bag_size=32).model_copy(update={
        "panel": Panel(features=panel), "labels": ("ctrl", "stim"), "normalization": Normalization()})
    seed = {**make_constants(spec), **draw_state(spec)}
    state = train_alone(select_cells(cells, spec), seed, spec, site=0, rounds=3)
    test = load_test(dealt.test, config, seed, spec)
    chances = predict_samples({**seed, **state}, test, spec)
    assert summarize_arm(test.y.numpy()[test.validation], chances, spec)["auroc"] == 1.0
