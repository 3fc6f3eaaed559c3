"""Classifiers of donors on fixed splits: the swarm against pooled training, each site alone, and a linear model.

    SWARMCHAIN_DATA=DIR python bench/donors.py [--tasks aml-skew aml-even kang] [--seeds 3] [--json]

The swarm's own statistics, training and merge, without chain and store (tests/test_donor.py holds both to the same
bytes). `aml`: one row per subject, five folds, the cases dealt evenly or skewed; scores are means over the folds.
`kang`: bags of cells, four folds that hold out two donors each, three sites with two donors; the sixteen samples'
probabilities of all folds are scored together.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from sums import sum_up

from swarmchain.baselines_donors import compare_donors, load_test, summarize_arm
from swarmchain.certify import Arrays
from swarmchain.checkpoint import allocate_tensors, decode_tensors
from swarmchain.config import DataConfig
from swarmchain.data import read_cells
from swarmchain.dealing import Dealt
from swarmchain.dealing_donors import AML_FOLDS, KANG_FOLDS, deal_aml, deal_kang
from swarmchain.layouts import checkpoint_layout
from swarmchain.merge import Input, compute_norm, merge_deltas
from swarmchain.merging import parse_merge
from swarmchain.planning import plan_donor
from swarmchain.selection import Cells, select_cells
from swarmchain.spec import DeepSets, DonorSpec, GatedAttention, Limits, Normalization, Pseudobulk, RowModel, Training
from swarmchain.trainer import prepare_training, train_round

MODELS = {"linear": RowModel(hidden=()), "mlp": RowModel(hidden=(64,), dropout=0.3), "pseudobulk": Pseudobulk(),
          "deep sets": DeepSets(encoder=(32,)), "attention": GatedAttention(encoder=(32,), attention=16)}
TASKS = {"aml-skew": ("linear", "mlp"), "aml-even": ("linear", "mlp"), "kang": ("pseudobulk", "deep sets", "attention")}


def make_settings(task: str, model: str, seed: int) -> dict[str, Any]:
    """What `plan_donor` gets; chosen on training donors, see docs/donors.md."""
    if task == "kang":
        training, rounds = Training(seed=seed, steps=5, batch_size=4), 10
    elif model == "linear":
        training, rounds = Training(seed=seed, steps=10, batch_size=32, lr=3e-3), 40
    else:
        training, rounds = Training(seed=seed, steps=10, batch_size=32, weight_decay=1e-3), 40
    return {"model": MODELS[model], "training": training, "limits": Limits(rounds=rounds, sites_to_start=2),
            "labels_min": 1, "bag_size": 32, "sites_per_feature_min": 2,
            "merge": parse_merge({"method": "clipped_mean"})}


def prepare(dealt: Dealt, normalization: Normalization, settings: dict[str, Any]) -> tuple[Any, ...]:
    """What the statistics run and the start of the training run do: spec, seed, data, counts, settings to read."""
    config = DataConfig(path="", label_column=dealt.label_column, donor_column=dealt.donor_column,
                        sample_column=dealt.sample_column, state="none" if normalization.kind == "none" else "auto")
    found = {site: read_cells(path, config, normalization) for site, path in dealt.files.items()}
    return (*prepare_cells(found, normalization, settings), config)


def prepare_cells(found: dict[str, Cells], normalization: Normalization, settings: dict[str, Any]) -> tuple[Any, ...]:
    """The same from cells that were read."""
    source, total, on_record = sum_up(found, normalization=normalization, split_by="donor")
    spec, blob = plan_donor((source, total), on_record, name="donors", **settings)
    seed = decode_tensors(blob, checkpoint_layout(spec))
    sites = {site: select_cells(cells, spec) for site, cells in found.items()}
    return spec, seed, sites, total["samples_per_label"]


def play(spec: DonorSpec, seed: Arrays, sites: dict[str, Any], counts: Any) -> Arrays:
    """The final checkpoint of a whole run."""
    layout = checkpoint_layout(spec)
    examples = [prepare_training(data, spec, seed, counts) for data in sites.values()]
    _, parent = allocate_tensors(layout)
    for key, value in seed.items():
        parent[key][...] = value
    for round_id in range(1, spec.limits.rounds + 1):
        inputs = []
        for i, own in enumerate(examples):
            made = train_round(parent, own, spec, round_id=round_id, site=i)
            inputs.append(Input(i, made.samples, made.deltas, compute_norm(made.deltas)))
        _, into = allocate_tensors(layout)
        merge_deltas(parent, inputs, spec.merge, into=into)
        parent = into
    return parent


def run_fold(task: str, model: str, seed: int, fold: int, settings: dict[str, Any] | None = None
             ) -> tuple[Any, dict[str, Any], DonorSpec]:
    """Truth and every arm's probabilities of the held-out samples."""
    import torch

    torch.set_num_threads(1)
    root = Path(os.environ["SWARMCHAIN_DATA"])
    with tempfile.TemporaryDirectory() as folder:
        if task == "kang":
            dealt, normalization = deal_kang(Path(folder) / "d", root, fold, seed=seed), Normalization()
        else:
            dealt = deal_aml(Path(folder) / "d", root, fold, skew=task == "aml-skew")
            normalization = Normalization(kind="none")
        spec, start, sites, counts, config = prepare(dealt, normalization, settings or make_settings(task, model, seed))
        test = load_test(dealt.test, config, start, spec)
        arms = compare_donors(play(spec, start, sites, counts), start, sites, test, spec)
    return test.y.numpy()[test.validation], arms, spec


def measure(task: str, model: str, seed: int, settings: dict[str, Any] | None = None) -> dict[str, dict[str, float]]:
    """AUROC and macro-F1 of every arm over all folds; local arms together, as mean and worst."""
    folds = [run_fold(task, model, seed, fold, settings) for fold in range(KANG_FOLDS if task == "kang" else AML_FOLDS)]
    spec = folds[0][2]
    if task == "kang":
        names = [name for name in folds[0][1] if all(name in arms for _, arms, _ in folds)]
        truth = np.concatenate([truth for truth, _, _ in folds])
        scores = {name: [summarize_arm(truth, np.concatenate([arms[name] for _, arms, _ in folds]), spec)]
                  for name in names}
    else:
        names = list(dict.fromkeys(name for _, arms, _ in folds for name in arms))
        scores = {name: [summarize_arm(t, arms[name], spec) for t, arms, _ in folds if name in arms] for name in names}
    means = {name: {key: float(np.mean([s[key] for s in found])) for key in ("auroc", "macro_f1")}
             for name, found in scores.items()}
    local = [means.pop(name) for name in names if name.startswith("local ")]
    means["local_mean"] = {key: float(np.mean([s[key] for s in local])) for key in ("auroc", "macro_f1")}
    means["local_worst"] = {key: min(s[key] for s in local) for key in ("auroc", "macro_f1")}
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if "SWARMCHAIN_DATA" not in os.environ:
        print("skipped: SWARMCHAIN_DATA must name the folder with flowcap2_aml, kang_ifnb_pbmc and splits")
        return
    wanted = [(task, model, seed) for task in options.tasks for model in TASKS[task] for seed in range(options.seeds)]
    with ProcessPoolExecutor(options.jobs) as pool:
        found = list(pool.map(measure, *zip(*wanted, strict=True)))
    rows = []
    for task, model in dict.fromkeys((task, model) for task, model, _ in wanted):
        own = [arms for (t, m, _), arms in zip(wanted, found, strict=True) if (t, m) == (task, model)]
        for arm in own[0]:
            rows.append({"task": task, "model": model, "arm": arm, "seeds": len(own)} | {
                f"{key}{suffix}": round(float(reduce([arms[arm][key] for arms in own])), 4)
                for key in ("auroc", "macro_f1") for suffix, reduce in (("", np.mean), ("_sd", np.std))})
    if options.json:
        print(json.dumps(rows))
        return
    print("| task | model | arm | AUROC | macro-F1 |\n|---|---|---|---:|---:|")
    for row in rows:
        print(f"| {row['task']} | {row['model']} | {row['arm']} | {row['auroc']:.3f} ± {row['auroc_sd']:.3f} | "
              f"{row['macro_f1']:.3f} ± {row['macro_f1_sd']:.3f} |")


if __name__ == "__main__":
    main()
