"""The page that a run leaves behind: one HTML file, self-contained, the same bytes for the same summary.

Figures are inline SVG that follow the page's light and dark colours; nothing is fetched from anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from rich import box
from rich.table import Table

from swarmchain.config import write_file

ARMS = (("central", "central (all cells pooled)"), ("swarm", "swarm"), ("local_mean", "local, mean of sites"),
        ("local_worst", "local, worst site"), ("linear", "logistic regression (pooled)"))
HEADS = (("central", "central"), ("swarm", "swarm"), ("local_mean", "local\nmean"), ("local_worst", "worst\nlocal"),
         ("linear", "logistic\nregression"))
# Okabe & Ito's colours and paler ones of them, told apart by most colour-blind readers
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#7f7f7f", "#8c6bb1", "#a65628")
TIME_COLOURS = {"train": "#0072b2", "chain": "#e69f00", "store": "#009e73", "merge": "#cc79a7", "wait": "var(--line)"}
TIMES = tuple(TIME_COLOURS)


@dataclass(frozen=True)
class Predictions:
    """Held-out cells: class names, true and predicted index [cells], UMAP [cells, 2], the site of each cell.

    `own_umap` and `own_sites` are of cells that the sites hold, in the same coordinates.
    """

    labels: tuple[str, ...]
    truth: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    umap: npt.NDArray[np.float32]
    sites: npt.NDArray[np.str_]
    own_umap: npt.NDArray[np.float32]
    own_sites: npt.NDArray[np.str_]


def format_metrics_table(summary: Mapping[str, Any]) -> Table:
    """The arms beside each other, for a terminal."""
    metrics = summary["metrics"]
    worst = metrics["local_worst"]["site"]
    table = Table(title="F1 on the same held-out cells", title_justify="left", box=box.SIMPLE_HEAD,
                  caption=f"worst local: {worst}", caption_justify="left")
    table.add_column("cell type (cells)", no_wrap=True, vertical="bottom")
    for key, words in HEADS:
        table.add_column(words, justify="right", style="green" if key == "swarm" else "", vertical="bottom")
    table.add_row("macro-F1", *(_number(metrics[key]["macro_f1"]) for key, _ in HEADS), style="bold", end_section=True)
    for label, cells in summary["support"].items():
        values = [_number(metrics[key]["per_class"].get(label)) for key, _ in HEADS]
        table.add_row(f"{label} ({cells})", *values)
    return table


def write_report(path: Path, *, summary: Mapping[str, Any], predictions: Predictions,
                 figures: Sequence[Path] = ()) -> None:
    """Write the page; it names the folder of `figures`. Raises `ConfigError` if the folder cannot be written."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("swarmchain"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["bytes"] = _bytes
    environment.filters["share"] = _share
    points, own = _points(predictions, [site["name"] for site in summary["sites"]])
    page = environment.get_template("report.html").render(
        s=summary, arms=ARMS, colours=_colours(len(predictions.labels)), labels=predictions.labels,
        site_colours=_colours(len(summary["sites"])), curves=_curves(summary), confusion=_confusion(predictions),
        points=points, own=own, figures=figures, wrong=sum(point[2] != point[3] for point in points),
        time_colours=TIME_COLOURS,
        timing=_timing(summary["timing_s"]["rounds"]), grid=_grid(summary),
    )
    write_file(path, page.encode())


def draw_figures(folder: Path, *, summary: Mapping[str, Any], predictions: Predictions) -> list[Path]:
    """The page's figures for other uses, as PNG and SVG: curves by round, confusion, F1, UMAPs of the held-out cells.

    Raises `ConfigError` if the folder cannot be written.
    """
    import anndata
    import pandas as pd

    from swarmchain.plots import plot_confusion, plot_curves, plot_f1, plot_umap

    labels, metrics, rounds = list(predictions.labels), summary["metrics"], summary["rounds"]
    scores = {site["name"]: [row["scores"].get(site["name"]) for row in rounds] for site in summary["sites"]}
    counts = np.array([[n for n, _ in row] for row in _confusion(predictions)], dtype=np.int64)
    arms = {words: [metrics[key]["per_class"].get(label) for label in labels]
            for key, words in (("swarm", "swarm"), ("central", "central"), ("local_mean", "a site alone, mean"))}
    obs = {"label": np.array(labels)[predictions.truth], "call": np.array(labels)[predictions.predicted],
           "right": predictions.truth == predictions.predicted}
    cells = anndata.AnnData(obs=pd.DataFrame(obs, index=np.arange(len(predictions.truth)).astype(str)),
                            obsm={"X_umap": predictions.umap})
    own = anndata.AnnData(obs=pd.DataFrame({"site": predictions.own_sites}, index=np.arange(
        len(predictions.own_sites)).astype(str)), obsm={"X_umap": predictions.own_umap})
    lines = {words: metrics[key]["macro_f1"] for key, words in (("central", "central"), ("local_mean", "local mean"))}
    titles = ("Held-out cells by true type", "Held-out cells by the swarm's call", "Right and wrong calls")
    stems, drawn = ("curves", "confusion", "f1", *(f"umap-{column}" for column in obs), "umap-site"), []
    for kind in ("png", "svg"):
        names = [folder / f"{stem}.{kind}" for stem in stems]
        plot_curves([row["round_id"] for row in rounds], scores, names[0], title="Macro-F1 by round",
                    test=[row["test_macro_f1"] for row in rounds], lines=lines)
        plot_confusion(counts, labels, names[1], title="Held-out cells, swarm")
        plot_f1(arms, labels, [int(n) for n in counts.sum(axis=1)], names[2], title="F1 on held-out cells")
        for path, column, words in zip(names[3:-1], obs, titles, strict=True):
            plot_umap(cells, column, path, title=words)
        plot_umap(own, "site", names[-1], title="The sites' own cells")
        drawn += names
    return drawn


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _share(value: float) -> str:
    return "1" if value >= 0.995 else "<.01" if value < 0.01 else f"{value:.2f}".lstrip("0")


def _bytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.0f} kB"


def _curves(summary: Mapping[str, Any]) -> dict[str, Any]:
    """SVG coordinates of the score curves in a box of 640 × 240."""
    rounds = summary["rounds"]
    count = max(len(rounds), 2)

    def path(values: Sequence[float | None]) -> str:
        points = [(i, v) for i, v in enumerate(values) if v is not None]
        return " ".join(f"{_x(i, count):.1f},{_y(v):.1f}" for i, v in points)

    names = [site["name"] for site in summary["sites"]]
    return {
        "test": path([row["test_macro_f1"] for row in rounds]),
        "sites": [(name, path([row["scores"].get(name) for row in rounds])) for name in names],
        "lines": [(words, _y(summary["metrics"][key]["macro_f1"])) for key, words in
                  (("central", "central"), ("local_mean", "local mean"))],
        "ticks": [(rounds[i]["round_id"], _x(i, count)) for i in range(0, len(rounds), max(1, len(rounds) // 10))],
        "grid": [(f"{v:.1f}", _y(v)) for v in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)],
    }


def _x(index: int, count: int) -> float:
    return 40 + 580 * index / (count - 1)


def _y(value: float) -> float:
    return 220 - 200 * value


def _confusion(predictions: Predictions) -> list[list[tuple[int, float]]]:
    """Rows of truth: (cells, share of the row)."""
    size = len(predictions.labels)
    flat = np.bincount(predictions.truth * size + predictions.predicted, minlength=size * size)
    counts = flat.reshape(size, size)
    return [[(int(n), float(n / max(row.sum(), 1))) for n in row] for row in counts]


def _points(predictions: Predictions, sites: Sequence[str]
            ) -> tuple[list[tuple[float, float, int, int]], list[tuple[float, float, int]]]:
    """UMAP positions in a box of 300 × 300: held-out cells with true and predicted label, the sites' own with the site.

    The sites' cells are in an order that puts none of them on top as a whole.
    """
    both = np.concatenate([predictions.umap, predictions.own_umap])
    low, high = both.min(axis=0), both.max(axis=0)
    unit = (both - low) / np.where(high > low, high - low, 1.0)
    at = [(round(8 + 284 * float(a), 1), round(292 - 284 * float(b), 1)) for a, b in unit]
    points = [(*p, int(t), int(c)) for p, t, c in zip(at, predictions.truth, predictions.predicted, strict=False)]
    index = {name: i for i, name in enumerate(sites)}
    own = [(*p, index[str(site)]) for p, site in zip(at[len(points) :], predictions.own_sites, strict=True)]
    return points, [own[i] for i in np.random.default_rng(0).permutation(len(own))]


def _timing(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean seconds over the sites for each kind of work: stacked bars 160 high, and median and maximum by kind."""
    rows: list[dict[str, Any]] = []
    for row in rounds:
        rows.append({"round_id": row["round_id"], **{kind: row[kind] for kind in TIMES}})
    longest = max((sum(r[k] for k in TIMES) for r in rows), default=0.0) or 1.0
    for row in rows:
        ends = np.cumsum([160 * row[kind] / longest for kind in TIMES])
        starts = [0.0, *ends[:-1]]
        row["bars"] = [(kind, 170 - end, end - start) for kind, start, end in zip(TIMES, starts, ends, strict=True)]
    kinds = [(k, float(np.median([r[k] for r in rows])), max(r[k] for r in rows)) for k in TIMES] if rows else []
    return {"rows": rows, "longest": longest, "step": 280 / max(len(rows), 12), "kinds": kinds}


def _grid(summary: Mapping[str, Any]) -> list[tuple[str, list[tuple[int, str, str]]]]:
    """For each site, each round: (round, kind, words)."""
    table = []
    for site in summary["sites"]:
        name = site["name"]
        row = []
        for item in summary["rounds"]:
            reason = next((e["reason"] for e in item["excluded"] if e["site"] == name), None)
            share = next((i["weight"] for i in item["included"] if i["site"] == name), None)
            kind, words = ("in", f"weight {share:.3f}") if share is not None else (
                ("out", str(reason)) if reason else ("absent", "did not contribute"))
            row.append((item["round_id"], kind, words + ("" if name in item["voted"] else ", did not vote")))
        table.append((name, row))
    return table
