"""The demonstration: a consortium on this machine, watched live, compared with the alternatives, and reported."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.markup import escape

from swarmchain.agreement import standardize
from swarmchain.audit import audit_run, read_record
from swarmchain.baselines import compare, predict
from swarmchain.certify import Arrays
from swarmchain.checkpoint import compute_size, decode_tensors
from swarmchain.config import read_site_config, write_file
from swarmchain.consortium import Consortium, start_consortium
from swarmchain.data import load_site_data, read_cells
from swarmchain.dealing import Dealt, deal_folder, deal_pbmc
from swarmchain.errors import AuditFailed, ConfigError, SwarmError
from swarmchain.layouts import checkpoint_layout
from swarmchain.metrics import compute_macro_f1
from swarmchain.page import write_audit
from swarmchain.planning import plan_cell_type, plan_statistics, read_statistics
from swarmchain.progress import Progress
from swarmchain.protocol import Outcome
from swarmchain.report import Predictions, draw_figures, format_metrics_table, write_report
from swarmchain.selection import SiteData, select_panel
from swarmchain.spec import CellTypeSpec, Limits, Model, Training, encode_spec
from swarmchain.store import read_checkpoint
from swarmchain.summary import build_rounds, measure_gas, summarize_timing, to_json

LEFTOVERS = "swarm"
SITE_CELLS_MAX = 500  # of a site, in the picture of all sites' cells

__all__ = ["run_demo"]


@dataclass(frozen=True)
class Settings:
    """What differs between the embedded data and a folder of one's own."""

    rounds: int
    steps: int
    sites_per_feature_min: int
    panel_share_min: float
    dropout: float


def run_demo(
    *, data: Path | None, splits: Path | None, label_column: str, out: Path, rounds: int | None, seed: int,
    console: Console,
) -> dict[str, Any]:
    """Do everything and write `out`: summary.json, report.html, figures, model, spec, annotated.h5ad, audit/.

    `out`/swarm keeps chain, contract and store, for `swarmchain devchain --state` and `swarmchain run verify`.

    Raises
    ------
    SwarmError
        What goes wrong, in one line; every process that was started is ended.
    """
    started = time.monotonic()
    torch.set_num_threads(1)
    if splits is not None and data is None:
        raise ConfigError("--splits goes with --data", hint="name the folder of .h5ad files with --data")
    settings = Settings(rounds or 15, 10, 2, 0.5, 0.0) if data is None else Settings(rounds or 50, 40, 3, 0.3, 0.0)
    _require_writable(out)
    _clear_leftovers(out / LEFTOVERS)
    work = Path(tempfile.mkdtemp(prefix="swarmchain-demo-"))
    try:
        dealt = deal_pbmc(work / "data", seed=seed) if data is None else deal_folder(
            work / "data", data, splits=splits, label_column=label_column, seed=seed)
        console.print(f"[bold]{dealt.title}[/bold] — {escape(dealt.dataset)}")
        with start_consortium(work / "swarm", dealt.files, label_column=dealt.label_column, seed=seed,
                              chain_options=("--state", str((out / LEFTOVERS / "chain.json").resolve()))) as consortium:
            summary = _run_swarm(consortium, dealt, settings, console, out=out, seed=seed, started=started)
        _keep_leftovers(work / "swarm", out / LEFTOVERS)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    console.print(format_metrics_table(summary), soft_wrap=False)
    final = summary["final"]
    verdict = "all sites hold the same bytes" if final["same_at_all_sites"] else "THE SITES DIFFER"
    console.print(f"{verdict}: checkpoint {final['checkpoint']}")
    proof = summary["audit"]
    console.print(f"replayed from chain and store, without a key: {proof['recomputed']} of {proof['finalized']} merges "
                  f"give the same bytes" if not proof["findings"] else f"NOT PROVEN: {proof['findings'][0]}")
    console.print(f"{summary['timing_s']['total']:.0f} s; open {out / 'report.html'}; "
                  f"for an ethics board, {out / 'audit' / 'audit.html'}")
    if not final["same_at_all_sites"]:
        raise SwarmError("the sites do not hold the same checkpoint", hint=f"see {out / 'summary.json'}")
    if proof["findings"]:
        raise AuditFailed(f"the run is not proven: {proof['findings'][0]}", hint=f"see {out / 'audit' / 'audit.html'}")
    return summary


def _run_swarm(
    consortium: Consortium, dealt: Dealt, settings: Settings, console: Console, *, out: Path, seed: int, started: float
) -> dict[str, Any]:
    chain, contract, sites = consortium.chain, consortium.contract, consortium.sites
    console.print(f"{chain.client} at {chain.rpc_url}, chain {chain.chain_id}; contract {contract.address}")
    first = consortium.propose(plan_statistics([s.card for s in sites], name="statistics", sites_to_start=len(sites)))
    watched = Progress(console, run=first + 1, rounds=settings.rounds, sites=len(sites),
                       get_outcome=lambda n: contract.get_phase(first + 1, n, at=contract.node.read_time())[1])
    consortium.start_agents([first, first + 1])
    processes = ", ".join(f"{s.name} (pid {s.process.pid})" for s in sites if s.process)
    console.print(f"agents: {processes}", markup=False)
    console.print(f"run {first}: summed statistics of all sites, no cell leaves its own")
    consortium.follow(watched.show, until=lambda: contract.view_run(first).finalized_round > 0)
    view = contract.view_run(first)
    spec, blob = plan_cell_type(
        read_statistics(consortium.store, view), view, name=dealt.title,
        limits=Limits(rounds=settings.rounds, sites_to_start=len(sites)), model=Model(dropout=settings.dropout),
        training=Training(seed=seed, steps=settings.steps), panel_share_min=settings.panel_share_min,
        sites_per_feature_min=min(settings.sites_per_feature_min, len(sites)),
    )
    consortium.store.put_blob(blob)
    setup_s = time.monotonic() - started
    run = consortium.propose(spec)
    console.print(f"run {run}: {len(spec.labels)} cell types on {len(spec.panel.features)} genes, "
                  f"{settings.rounds} rounds of {settings.steps} steps; scores are each site's own validation macro-F1")
    with console.status("the agents are starting") as watched.status:
        consortium.follow(watched.show)
    return _conclude(consortium, dealt, spec, watched, run=run, statistics_run=first, out=out, seed=seed,
                     times=(started, setup_s))


def _conclude(
    consortium: Consortium, dealt: Dealt, spec: CellTypeSpec, watched: Progress, *, run: int, statistics_run: int,
    out: Path, seed: int, times: tuple[float, float],
) -> dict[str, Any]:
    contract, store = consortium.contract, consortium.store
    view = contract.view_run(run)
    if view.outcome is not Outcome.FINALIZED and not view.finalized_round:
        raise SwarmError("no round was finalized", hint="see the agents' output above")
    names = {record.site: record.name for record in contract.get_sites()}
    layout = checkpoint_layout(spec)
    data = _load_sites(consortium, spec)
    blob = store.get_blob(view.checkpoint, bytes_max=compute_size(layout))
    final = decode_tensors(blob, layout)
    seed_tensors = read_checkpoint(store, spec.seed_checkpoint, spec)
    test = _load_test(dealt, spec, final)
    rounds = build_rounds(contract, store, run, names)
    for row in rounds:
        if row["checkpoint"]:
            tensors = read_checkpoint(store, row["checkpoint"], spec)
            row["test_macro_f1"] = compute_macro_f1(test.y, predict(tensors, test.x, spec), classes=len(spec.labels))
    predicted = predict(final, test.x, spec)
    held = {site: event["checkpoint"] for site, event in watched.events
            if event["event"] == "ended" and event["run"] == run}
    summary: dict[str, Any] = {
        "format": "swarmchain-summary/1", "title": dealt.title, "dataset": dealt.dataset,
        "sites": [_describe_site(i, s.name, s.signer.address, data[s.name], spec)
                  for i, s in enumerate(consortium.sites)],
        "run": {"run_id": run, "spec": view.spec, "contract": contract.address, "chain_id": contract.chain_id,
                "client": consortium.chain.client, "head": view.head, "statistics_run_id": statistics_run},
        "rounds": rounds,
        "final": {"checkpoint": view.checkpoint, "round_id": view.finalized_round,
                  "same_at_all_sites": set(held) == set(names.values()) and set(held.values()) == {view.checkpoint},
                  "by_site": dict(sorted(held.items()))},
        "metrics": compare(final, seed_tensors, data, (test.x, test.y), spec),
        "support": {label: int((test.y == i).sum()) for i, label in enumerate(spec.labels)},
        "gas": measure_gas(contract, run, names),
        "bytes": {site: event["bytes"] for site, event in watched.events
                  if event["event"] == "ended" and event["run"] == run},
        "seed": seed, "versions": _versions(),
    }
    audit = audit_run(read_record(contract, run), store, spool_folder=consortium.folder / "audit")
    write_audit(out / "audit", audit)
    summary["audit"] = {"findings": audit.all_findings, "finalized": sum(bool(r.checkpoint) for r in audit.rounds),
                        "recomputed": sum(r.is_recomputed for r in audit.rounds)}
    umap, umap_sites, sites = _embed(dealt, test, data, final)
    summary["timing_s"] = summarize_timing(watched.events, run, total=time.monotonic() - times[0], setup=times[1])
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "model.safetensors", blob)
    write_file(out / "spec.json", encode_spec(spec))
    _write_annotated(out / "annotated.h5ad", test, predicted, umap, spec)
    predictions = Predictions(spec.labels, test.y, predicted, umap, test.sites, umap_sites, sites)
    figures = draw_figures(out / "figures", summary=summary, predictions=predictions)
    write_report(out / "report.html", summary=summary, predictions=predictions, figures=figures)
    write_file(out / "summary.json", to_json(summary))
    return summary


@dataclass(frozen=True)
class TestCells:
    """Held-out cells of all sites: `x` standardised [cells, panel], `y` [cells], names and sites [cells]."""

    x: Any
    y: Any
    names: Any
    sites: Any


def _load_sites(consortium: Consortium, spec: CellTypeSpec) -> dict[str, SiteData]:
    return {s.name: load_site_data(read_site_config(s.toml), spec) for s in consortium.sites}


def _load_test(dealt: Dealt, spec: CellTypeSpec, constants: Arrays) -> TestCells:
    from swarmchain.config import DataConfig

    settings = DataConfig(path="", label_column=dealt.label_column)
    xs, ys, names, sites = [], [], [], []
    for site, path in dealt.test.items():
        cells = read_cells(path, settings, spec.normalization)
        x, present = select_panel(cells, spec.panel.model_copy(update={"share_min": 0.0}))
        known = np.isin(cells.labels, spec.labels)
        xs.append(standardize(x, present, constants)[known])
        ys.append(np.array([spec.labels.index(v) for v in cells.labels[known].tolist()], dtype=np.int64))
        names.append(cells.names[known])
        sites.append(np.full(int(known.sum()), site))
    return TestCells(np.concatenate(xs), np.concatenate(ys), np.concatenate(names), np.concatenate(sites))


def _embed(dealt: Dealt, test: TestCells, data: dict[str, SiteData], constants: Arrays) -> tuple[Any, Any, Any]:
    """UMAP of the test cells, that of sites' own cells, and the sites of these.

    The published one of the embedded data, else scanpy's on the standardised panel, of so many cells of each site.
    """
    if dealt.umap:
        names = {site: anndata.read_h5ad(path, backed="r").obs_names for site, path in dealt.files.items()}
        own = [dealt.umap[name] for site in names for name in names[site]]
        return (np.array([dealt.umap[name] for name in test.names.tolist()], dtype=np.float32),
                np.array(own, dtype=np.float32), np.repeat(list(names), [len(n) for n in names.values()]))
    import scanpy

    parts = {}
    for site, cells in data.items():
        rows = np.unique(np.linspace(0, len(cells.y) - 1, min(len(cells.y), SITE_CELLS_MAX)).astype(np.int64))
        parts[site] = standardize(cells.x[rows], cells.present, constants)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba and umap on threads and seeds
        table = anndata.AnnData(np.concatenate([test.x, *parts.values()]))
        scanpy.pp.pca(table, n_comps=min(30, min(table.shape) - 1), random_state=0)
        scanpy.pp.neighbors(table, n_neighbors=15, random_state=0)
        scanpy.tl.umap(table, random_state=0)
    umap = np.asarray(table.obsm["X_umap"], dtype=np.float32)
    return umap[: len(test.y)], umap[len(test.y) :], np.repeat(list(parts), [len(x) for x in parts.values()])


def _write_annotated(path: Path, test: TestCells, predicted: Any, umap: Any, spec: CellTypeSpec) -> None:
    labels = np.array(spec.labels)
    columns = {
        "cell_type": pd.Categorical(labels[test.y], spec.labels), "site": pd.Categorical(test.sites),
        "predicted": pd.Categorical(labels[predicted], spec.labels),
    }
    index = [f"{site}:{name}" for site, name in zip(test.sites, test.names, strict=True)]
    obs = pd.DataFrame(columns, index=index)
    data = anndata.AnnData(X=test.x, obs=obs, var=pd.DataFrame(index=list(spec.panel.features)), obsm={"X_umap": umap})
    temporary = path.with_name(f".{path.name}.tmp")
    data.write_h5ad(temporary)
    temporary.replace(path)


def _describe_site(index: int, name: str, address: str, data: SiteData, spec: CellTypeSpec) -> dict[str, Any]:
    counts = np.bincount(data.y, minlength=len(spec.labels))
    return {"site": index, "name": name, "address": address, "cells_train": len(data.train),
            "cells_validation": len(data.validation), "features_present": int(data.present.sum()),
            "features_total": len(data.present),
            "label_counts": {label: int(n) for label, n in zip(spec.labels, counts, strict=True)}}


def _versions() -> dict[str, str]:
    packages = ("swarmchain", "torch", "numpy", "scanpy", "anndata", "web3")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def _clear_leftovers(folder: Path) -> None:
    """Remove what an earlier demo left; a folder of anything else is not touched."""
    if folder.exists():
        if not (folder / "chain.json").exists():
            raise ConfigError(f"{folder} is there already, and no demo left it", hint="name another folder with --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _keep_leftovers(swarm: Path, folder: Path) -> None:
    """All that an outsider needs to verify the runs, beside the chain's own state: no key, no cells."""
    shutil.copytree(swarm / "store", folder / "store")
    shutil.copy(swarm / "deployment.json", folder)


def _require_writable(out: Path) -> None:
    """Say so before the work, not after it."""
    write_file(out / ".probe", b"")
    (out / ".probe").unlink()
