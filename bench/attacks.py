"""What hostile sites can do to a model, by merge method: five sites, real cells, one or two of them hostile.

    SWARMCHAIN_DATA=DIR python bench/attacks.py [--rounds 40] [--methods …] [--data …] [--json] [--write]
    SWARMCHAIN_DATA=DIR python bench/attacks.py --each [--data …] [--json] [--write]

The swarm's own training, statistics, ratings and certificates, without chain and store. Macro-F1 on the held-out cells
of the five PBMC studies (`pbmc_multistudy`) and of mass cytometry dealt with label skew (`cytof_multicenter_small`,
deal 0), after `--rounds` rounds of 20 steps. `honest` is the method with all five sites honest; under an attack the
table says what it costs, against the same method with the honest sites alone (a site that is found out is a site less,
and nothing more). Hostile are the last one or two sites by name; with `--each`, for the default method alone, every
site in turn. A hostile site also lies in its ratings: all honest sites harm it, as much as can be said, and its fellows
do not. A method with `+ trust` weighs ratings, the others do not (`"trust": null` in the spec). Attacks:

scale       the site's honest delta × 1000
sign        the site's honest delta × -1
nan         NaN: refused by the reader before any method sees it
label flip  trained on labels turned round
gaussian    normal noise, SD 1 in every parameter
ipm         minus the mean of the honest deltas (inner-product manipulation, Xie et al. 2020), as large as they are; who
            knows the others' deltas must have seen them before it committed, so that here it is given more than it has
inflation   the sign attack, claiming 10¹² cells
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from sums import sum_up
from tables import replace_table

from swarmchain.agreement import standardize
from swarmchain.baselines import predict
from swarmchain.certify import NO_PARENT, Arrays, Certified, Gathered, certify
from swarmchain.checkpoint import decode_tensors
from swarmchain.config import DataConfig
from swarmchain.data import read_cells
from swarmchain.dealing import deal_folder
from swarmchain.layouts import checkpoint_layout
from swarmchain.merge import Input, compute_norm
from swarmchain.methods import METHODS
from swarmchain.metrics import compute_macro_f1
from swarmchain.planning import plan_cell_type
from swarmchain.protocol import EFFECT_MNAT_MAX, Opening, Rating, RoundKey
from swarmchain.rating import Rater, find_labels
from swarmchain.selection import select_cells, select_panel
from swarmchain.spec import CellTypeSpec, Limits, Normalization, Training
from swarmchain.trainer import TrainingSet, prepare_training, train_round
from swarmchain.trust import Claim

DATA = ("pbmc_multistudy", "cytof_multicenter_small")
ATTACKS = ("scale", "sign", "nan", "label flip", "gaussian", "ipm", "inflation")
CLAIM = 10**12
SITES = 5


@dataclass(frozen=True)
class Task:
    """Five sites ready to train, and the held-out cells: `x` standardised, `y`."""

    spec: CellTypeSpec
    seed: Arrays
    cells: list[TrainingSet]
    x: Any
    y: Any


@cache
def load(name: str, rounds: int) -> Task:
    root = Path(os.environ["SWARMCHAIN_DATA"])
    with tempfile.TemporaryDirectory() as folder:
        if name == DATA[0]:
            dealt = deal_folder(Path(folder) / "d", root / name, splits=root / "splits" / f"{name}.csv.gz",
                                label_column="cell_type", seed=0)
            files, tests, normalization, common, share = dealt.files, dealt.test, Normalization(), 3, 0.3
            config = DataConfig(path="", label_column="cell_type")
        else:
            files, tests = deal_cytometry(root, Path(folder))
            normalization, common, share = Normalization(kind="none"), 1, 0.5
            config = DataConfig(path="", label_column="cell_type", state="none")
        return prepare(files, tests, config, normalization, common=common, share=share, rounds=rounds)


def deal_cytometry(root: Path, folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """One file per site of the deal with label skew, and one with the held-out cells; arcsinh with the cofactor 5."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = anndata.read_h5ad(root / "cytof_multicenter" / "cytof_multicenter_small.h5ad")
        table = pd.read_csv(root / "splits" / "cytof_multicenter_small.csv.gz", dtype=str).set_index("cell")
        table = table.loc[data.obs_names]
        data.X = np.arcsinh(data.X / np.float32(5)).astype(np.float32)
        paths = {}
        is_train = table["split"] == "train"
        for site in [*sorted(table.loc[is_train, "site_skew0"].unique()), "test"]:
            chosen = ~is_train if site == "test" else is_train & (table["site_skew0"] == site)
            paths[site] = folder / f"{site}.h5ad"
            anndata.AnnData(data.X[chosen.to_numpy()], obs=data.obs.loc[chosen.to_numpy(), ["cell_type"]],
                            var=pd.DataFrame(index=data.var_names)).write_h5ad(paths[site])
    return {site: path for site, path in paths.items() if site != "test"}, {"test": paths["test"]}


def prepare(files: dict[str, Path], tests: dict[str, Path], config: DataConfig, normalization: Normalization, *,
            common: int, share: float, rounds: int) -> Task:
    """What the statistics run and the start of the training run do."""
    found = {site: read_cells(path, config, normalization) for site, path in files.items()}
    source, sums, on_record = sum_up(found, normalization=normalization)
    spec, blob = plan_cell_type((source, sums), on_record, name="attacks", sites_per_feature_min=common,
                                panel_share_min=share, limits=Limits(rounds=rounds, sites_to_start=len(found)),
                                training=Training(steps=20))
    seed = decode_tensors(blob, checkpoint_layout(spec))
    rows = [source.labels.index(label) for label in spec.labels]
    sites = [prepare_training(select_cells(cells, spec), spec, seed, sums["cells_per_label"][rows])
             for cells in found.values()]
    xs, ys = [], []
    for path in tests.values():
        cells = read_cells(path, config, normalization)
        x, present = select_panel(cells, spec.panel.model_copy(update={"share_min": 0.0}))
        xs.append(standardize(x, present, seed))
        ys.append(np.array([spec.labels.index(label) for label in cells.labels.tolist()]))
    return Task(spec, seed, sites, np.concatenate(xs), np.concatenate(ys))


@dataclass(frozen=True)
class Played:
    """A whole run: macro-F1, and in how many rounds each site was left out for its ratings."""

    score: float
    left_out: dict[int, int]


def play(name: str, rounds: int, method: dict[str, Any], attack: str, hostile: tuple[int, ...]) -> Played:
    """The attack `absent` leaves the hostile sites out."""
    import torch

    torch.set_num_threads(1)
    task = load(name, rounds)
    spec = CellTypeSpec.model_validate({**task.spec.model_dump(), "merge": method})
    bad = frozenset(hostile)
    cells = [flip(c, len(spec.labels)) if i in bad and attack == "label flip" else c for i, c in enumerate(task.cells)]
    raters = [Rater(c, spec) for c in cells]
    parent: Arrays = task.seed
    noise, left_out = np.random.default_rng(1), dict.fromkeys(range(len(cells)), 0)
    made: Certified | None = None
    ratings: dict[int, tuple[Rating, ...]] = {}
    for round_id in range(1, rounds + 1):
        trained = {i: train_round(parent, c, spec, round_id=round_id, site=i) for i, c in enumerate(cells)
                   if not (i in bad and attack in ("absent", "nan"))}
        honest = [m.deltas for i, m in trained.items() if i not in bad]
        gathered = []
        for i, contribution in trained.items():
            deltas, samples = contribution.deltas, contribution.samples
            if i in bad:
                deltas, samples = spoil(attack, deltas, honest, noise), CLAIM if attack == "inflation" else samples
            opening = Opening(digest="0" * 64, samples=samples, nonce="0" * 64, labels=find_labels(task.cells[i]),
                              ratings=ratings.get(i, ()))
            gathered.append(Gathered("0" * 64, opening, Input(i, samples, deltas, compute_norm(deltas))))
        previous = (NO_PARENT, None) if made is None else (made.manifest_digest, made.manifest)
        made = certify(spec, ("0" * 64, parent), (gathered, []), previous=previous, spec_digest="0" * 64, rejections=0,
                       key=RoundKey(1, "0x" + "0" * 40, 1, round_id))
        for item in made.manifest.included:
            left_out[item.site] += item.doubt is not None
        if spec.merge.trust is not None:
            ratings = {i: rate(i, bad, parent, (gathered, made), raters) for i in trained}
        parent = made.tensors
    with np.errstate(all="ignore"):
        score = compute_macro_f1(task.y, predict(parent, task.x, spec), classes=len(spec.labels))
    return Played(score, left_out)


def rate(rater: int, bad: frozenset[int], parent: Arrays, found: tuple[list[Gathered], Certified],
         raters: list[Rater]) -> tuple[Rating, ...]:
    """What a site says of the others: what it measured, or, if it is hostile, the worst of all honest ones."""
    clips = {item.site: item.clip_factor for item in found[1].manifest.included}
    labels = {item.site: item.labels for item in found[1].manifest.included}
    others = [item.contribution for item in found[0] if item.contribution.site != rater]
    claims = [Claim(o.site, clips[o.site], labels[o.site], o.tensors) for o in others]
    if rater in bad:
        return tuple(Rating(site=o.site, effect_mnat=-EFFECT_MNAT_MAX if o.site in bad else EFFECT_MNAT_MAX)
                     for o in others)
    return raters[rater].rate(parent, claims)


def flip(cells: TrainingSet, labels: int) -> TrainingSet:
    return replace(cells, y=labels - 1 - cells.y)


def spoil(attack: str, deltas: Arrays, honest: list[Arrays], noise: np.random.Generator) -> Arrays:
    if attack == "scale":
        return {name: delta * np.float32(1000) for name, delta in deltas.items()}
    if attack in ("sign", "inflation"):
        return {name: -delta for name, delta in deltas.items()}
    if attack == "gaussian":
        return {name: noise.standard_normal(delta.shape, dtype=np.float32) for name, delta in deltas.items()}
    if attack == "ipm":
        return {name: -np.mean([d[name] for d in honest], axis=0, dtype=np.float32) for name in deltas}
    return deltas


Job = tuple[str, int, dict[str, Any], str, tuple[int, ...]]


def measure(names: list[str], methods: list[dict[str, Any]], rounds: int, jobs: int, *, is_each: bool = False
            ) -> list[dict[str, Any]]:
    wanted: list[Job] = []
    for name in names:
        for method in methods:
            hostile_max = {"hostile_max": 2} if method["method"] == "multi_krum" else {}
            wanted.append((name, rounds, method, "honest", ()))
            for hostile in [(i,) for i in range(SITES)] if is_each else [(SITES - 1,), (SITES - 2, SITES - 1)]:
                chosen = {**method, **(hostile_max if len(hostile) == 2 else {})}
                wanted += [(name, rounds, chosen, attack, hostile) for attack in ("absent", *ATTACKS)]
    with ProcessPoolExecutor(jobs) as pool:
        played = list(pool.map(play, *zip(*wanted, strict=True)))
    return [{"data": name, "method": name_method(method), "settings": method, "attack": attack, "hostile": hostile,
             "macro_f1": round(found.score, 4),
             "rounds_left_out": sum(found.left_out[i] for i in hostile),
             "rounds_wrongly_left_out": sum(n for i, n in found.left_out.items() if i not in hostile)}
            for (name, _, method, attack, hostile), found in zip(wanted, played, strict=True)]


def name_method(method: dict[str, Any]) -> str:
    is_trusting = method.get("trust", True) is not None
    return f"`{method['method']}`" + (" + trust" if is_trusting else "")


def format_tables(rows: list[dict[str, Any]]) -> str:
    parts = []
    for name in dict.fromkeys(row["data"] for row in rows):
        plain = next((r["macro_f1"] for r in rows if r["data"] == name and r["method"] == "`mean`"
                      and r["attack"] == "honest"), None)
        for count in (1, 2):
            lines = [f"\n`{name}`, {count} of {SITES} sites hostile\n",
                     "| method | honest | against `mean` | without the hostile | " + " | ".join(ATTACKS) + " |",
                     "|---|---:|---:|---:|" + "---:|" * len(ATTACKS)]
            for method in dict.fromkeys(row["method"] for row in rows):
                own = {r["attack"]: r["macro_f1"] for r in rows if r["data"] == name and r["method"] == method
                       and len(r["hostile"]) in (0, count)}
                costs = " | ".join(f"{own[a] - own['absent']:+.3f}" for a in ATTACKS)
                against = "" if plain is None else f"{own['honest'] - plain:+.3f}"
                lines.append(f"| {method} | {own['honest']:.3f} | {against} | {own['absent']:.3f} | {costs} |")
            parts.append("\n".join(lines) + "\n")
    return "".join(parts).lstrip()


def format_each(rows: list[dict[str, Any]]) -> str:
    """One line for each hostile site: what every attack cost, and in how many rounds the site was left out for it."""
    parts = []
    for name in dict.fromkeys(row["data"] for row in rows):
        lines = [f"\n`{name}`, each of {SITES} sites hostile in turn\n",
                 "| hostile | without it | " + " | ".join(ATTACKS) + " | honest sites left out |",
                 "|---|---:|" + "---:|" * (len(ATTACKS) + 1)]
        for hostile in sorted({r["hostile"] for r in rows if r["data"] == name and r["hostile"]}):
            own = {r["attack"]: r for r in rows if r["data"] == name and r["hostile"] == hostile}
            absent = own["absent"]["macro_f1"]
            costs = " | ".join(f"{own[a]['macro_f1'] - absent:+.3f} ({own[a]['rounds_left_out']})" for a in ATTACKS)
            wrong = sum(r["rounds_wrongly_left_out"] for r in own.values())
            lines.append(f"| site {hostile[0]} | {absent:.3f} | {costs} | {wrong} |")
        parts.append("\n".join(lines) + "\n")
    return "".join(parts).lstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--methods", nargs="+", help="names, or JSON settings")
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    parser.add_argument("--each", action="store_true", help="every site in turn, with the default method")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    options = parser.parse_args()
    if "SWARMCHAIN_DATA" not in os.environ:
        print("skipped: SWARMCHAIN_DATA must name the folder with pbmc_multistudy, cytof_multicenter and splits")
        return
    chosen = [json.loads(m) if m.startswith("{") else {"method": m, "trust": None} for m in options.methods or METHODS]
    default = {"method": "clipped_mean"}
    methods = [default] if options.each else chosen if options.methods else [default, *chosen]
    rows = measure(options.data, methods, options.rounds, options.jobs, is_each=options.each)
    if options.json:
        print(json.dumps(rows))
        return
    table = format_each(rows) if options.each else format_tables(rows)
    print(table, end="")
    if options.write:
        replace_table("each" if options.each else "attacks", table)


if __name__ == "__main__":
    main()
