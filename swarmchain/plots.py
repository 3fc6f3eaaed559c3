"""Pictures of a model, through matplotlib and scanpy: one function for each, PNG or SVG by the file's name.

Colours are Okabe & Ito's, told apart by most colour-blind readers; from the ninth kind on darker and paler ones of the
same hues. The same numbers give the same bytes on one machine: no date, no random ids.
"""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from swarmchain.calibration import compute_class_scores
from swarmchain.errors import ConfigError

if TYPE_CHECKING:
    import anndata

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Okabe & Ito 2008; black is left for what is not a category. Then darker and paler ones of the same hues.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f7f7f",
           "#003f66", "#8c5e00", "#005540", "#7a3d60", "#a6d8f2", "#7a3300", "#b3a800", "#404040")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "//", "..", "xx")
RIGHT, WRONG, LINE = "#0072b2", "#d55e00", "#333333"
DOTS = 150  # per inch
CELLS_MAX = 20_000
SAMPLES_MAX = 40

STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "svg.hashsalt": "swarmchain",
    "svg.fonttype": "none", "figure.dpi": DOTS, "savefig.dpi": DOTS, "legend.frameon": False,
}


def plot_confusion(confusion: Ints, labels: Sequence[str], path: Path, *, title: str = "Confusion",
                   unit: str = "cells") -> None:
    """Row-normalised confusion matrix, [labels, labels] of counts: label in rows, call in columns."""
    count = len(labels)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    size = max(3.6, 0.42 * count + 1.6)
    with mpl.rc_context({**STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(size + 2.2, size), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(np.ma.masked_where(confusion.sum(axis=1, keepdims=True).repeat(count, 1) == 0, shares),
                            cmap="Blues", vmin=0, vmax=1)
        short = shorten_all(labels)
        angle = 90 if any("\n" in label for label in short) else 45  # two lines need to stand upright
        axes.set_xticks(range(count), short, rotation=angle, ha="right", va="center" if angle == 90 else "top",
                        rotation_mode="anchor")
        axes.set_yticks(range(count), _add_counts(labels, confusion.sum(axis=1)))
        axes.tick_params(length=0)
        small = 8 if count <= 12 else 6
        for i, j in zip(*np.nonzero(confusion), strict=True):
            axes.text(j, i, _format_share(shares[i, j]), ha="center", va="center", fontsize=small,
                      color="white" if shares[i, j] > 0.6 else "black")
        axes.set_xticks(np.arange(-0.5, count), minor=True)
        axes.set_yticks(np.arange(-0.5, count), minor=True)
        axes.grid(which="minor", color="#cccccc", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
        axes.set(xlabel="call", ylabel=f"label ({unit})", title=f"{title}, n = {confusion.sum():,} {unit}")
        figure.colorbar(image, ax=axes, shrink=0.8, label=f"share of the label's {unit}")
        save(figure, path)


def plot_f1(arms: Mapping[str, Sequence[float | None]], labels: Sequence[str], support: Sequence[int], path: Path, *,
            title: str = "F1 per label", unit: str = "cells") -> None:
    """Bars of F1 for every label, one for each arm (swarm, local, central); labels without any cell are left out."""
    rows = [i for i, n in enumerate(support) if n]
    labels, support = [labels[i] for i in rows], [support[i] for i in rows]
    arms = {name: [values[i] for i in rows] for name, values in arms.items()}
    count, width = len(labels), 0.8 / len(arms)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, max(2.2, 0.16 * count * (len(arms) + 1) + 1.1)), layout="constrained")
        axes = figure.add_subplot()
        for k, (name, values) in enumerate(arms.items()):
            known = [(i, value) for i, value in enumerate(values) if value is not None]
            places = np.array([i for i, _ in known]) + (k - (len(arms) - 1) / 2) * width
            bars = axes.barh(places, [value for _, value in known], height=width * 0.92, color=COLOURS[k % 16],
                             hatch=HATCHES[k // 16 % 4], label=name)
            axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        axes.set_yticks(range(count), _add_counts(labels, support))
        axes.set_ylim(count - 0.45, -0.55)
        axes.set(xlim=(0, 1.08), xlabel="F1", title=f"{title}, n = {sum(support):,} {unit}")
        axes.set_xticks(np.arange(0, 1.01, 0.2))
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.tick_params(axis="y", length=0)
        if len(arms) > 1:
            figure.legend(loc="outside lower center", ncols=min(len(arms), 4))
        save(figure, path)


def plot_curves(rounds: Sequence[int], sites: Mapping[str, Sequence[float | None]], path: Path, *,
                test: Sequence[float | None] | None = None, lines: Mapping[str, float] | None = None,
                title: str = "Score by round") -> None:
    """Macro-F1 by round: every site's on its own validation cells, the test score, and levels (central, local)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for k, (short, values) in enumerate(zip(shorten_all(list(sites)), sites.values(), strict=True)):
            axes.plot(rounds, _to_numbers(values), color=COLOURS[k % 16], linewidth=1.1, markersize=3.5,
                      marker=MARKERS[k % len(MARKERS)], label=short)
        if test is not None:
            axes.plot(rounds, _to_numbers(test), color="black", linewidth=2.2, label="test cells")
        for (name, value), style in zip((lines or {}).items(), ("--", ":", "-.", (0, (1, 3))), strict=False):
            axes.axhline(value, color=LINE, linewidth=1, linestyle=style, label=f"{name} ({value:.3f})")
        axes.set(xlabel="round", ylabel="macro-F1", ylim=(0, 1.02), title=f"{title}, n = {len(rounds)} rounds")
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        axes.grid(color="#dddddd", linewidth=0.6)
        figure.legend(loc="outside right upper")
        save(figure, path)


def plot_attention(shares: Floats, cells: Ints, kinds: Sequence[str], names: Sequence[str], calls: Sequence[str],
                   path: Path, *, title: str = "Which cells carried the call") -> None:
    """Attention by kind of cell, one bar for each sample, and under it, thinner, the kinds' shares of its cells.

    Parameters
    ----------
    shares, cells
        Attention, and number of cells, [samples, kinds].
    names, calls
        Of the samples; a call is what stands beside its bar.
    """
    shown = min(len(names), SAMPLES_MAX)
    rest = "" if shown == len(names) else f", the first {shown} shown"
    mixes = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
    with mpl.rc_context({**STYLE, "axes.spines.left": False}):
        figure = Figure(figsize=(7.4, max(2.4, 0.42 * shown + 1.2)), layout="constrained")
        axes = figure.add_subplot()
        left, under = np.zeros(shown), np.zeros(shown)
        for k, kind in enumerate(shorten_all(kinds)):
            style: Any = {"color": COLOURS[k % 16], "hatch": HATCHES[k // 16 % 4], "edgecolor": "white",
                          "linewidth": 0.4}
            axes.barh(np.arange(shown) - 0.1, shares[:shown, k], left=left, height=0.5, label=kind, **style)
            axes.barh(np.arange(shown) + 0.28, mixes[:shown, k], left=under, height=0.16, alpha=0.75, **style)
            left, under = left + shares[:shown, k], under + mixes[:shown, k]
        for i, call in enumerate(calls[:shown]):
            axes.text(1.01, i, call, va="center", fontsize=8)
        axes.set_yticks(range(shown), shorten_all(list(names[:shown])))
        axes.set_ylim(shown - 0.4, -0.6)
        axes.set(xlim=(0, 1), xlabel="share of attention (thick) and of cells (thin)",
                 title=f"{title}, n = {len(names):,} samples{rest}")
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower center", ncols=3)
        save(figure, path)


def plot_reliability(bars: Sequence[Any], path: Path, *, error: float, threshold: float | None = None,
                     title: str = "Reliability", unit: str = "cells") -> None:
    """Share of right calls against confidence, and how many calls there are; `bars` as `calibration.Bar`."""
    cells = sum(bar.cells for bar in bars)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 4.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        known = [bar for bar in bars if bar.right_share is not None]
        upper.bar([bar.low for bar in known], [bar.right_share for bar in known], align="edge",
                  width=[bar.high - bar.low for bar in known], color=RIGHT, edgecolor="white", label="right calls")
        upper.plot([0, 1], [0, 1], color=LINE, linestyle="--", linewidth=1, label="perfect calibration")
        lower.bar([bar.low for bar in bars], [bar.cells for bar in bars], align="edge",
                  width=[bar.high - bar.low for bar in bars], color="#7f7f7f", edgecolor="white")
        if threshold is not None:
            for axes in (upper, lower):
                axes.axvline(threshold, color=WRONG, linewidth=1.4,
                             label=f"unknown below {threshold:.2f}" if axes is upper else None)
        upper.set(ylim=(0, 1.02), ylabel="share of right calls",
                  title=f"{title}, n = {cells:,} {unit}\nexpected calibration error {error:.3f}")
        lower.set(xlim=(0, 1), xlabel="confidence", ylabel=unit)
        lower.set_yscale("symlog", linthresh=1)
        upper.legend(loc="upper left")
        save(figure, path)


def plot_umap(data: anndata.AnnData, column: str, path: Path, *, title: str, is_rare: bool = False) -> None:
    """Scanpy's UMAP of cells (`obsm["X_umap"]`) by a column of obs; booleans are right (true) and wrong (false).

    Of numbers low ones lie on top or, where what matters `is_rare`, high ones, up to the 99th percentile.
    """
    import scanpy

    values = data.obs[column]
    if values.dtype.kind == "f":
        shown, palette = values.to_numpy(), None
        order = np.argsort(values.to_numpy() * (1 if is_rare else -1), kind="stable")
    elif values.dtype == bool:
        words = np.where(values, "right", "wrong")
        shown, palette = words, {"right": "#bbbbbb", "wrong": WRONG}
        order = np.argsort(values.to_numpy())[::-1]  # wrong ones on top
    else:
        kinds = sorted(set(values.astype(str)))
        short = dict(zip(kinds, shorten_all(kinds), strict=True))
        shown = np.array([short[str(value)] for value in values], dtype=object)
        palette = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(short.values())}
        order = np.random.default_rng(0).permutation(data.n_obs)  # so that none lies on top as a whole
    with warnings.catch_warnings(), mpl.rc_context(STYLE):
        warnings.simplefilter("ignore")  # scanpy and pandas on their own ways
        import anndata

        cells = anndata.AnnData(obs={column: shown[order]}, obsm={"X_umap": np.asarray(data.obsm["X_umap"])[order]})
        if palette:
            cells.obs[column] = cells.obs[column].astype("category")
        figure = Figure(figsize=(6.6, 4.4), layout="constrained")
        axes = figure.add_subplot()
        scanpy.pl.umap(cells, color=column, ax=axes, show=False, palette=palette, sort_order=False, frameon=True,
                       color_map="cividis", vmax="p99" if is_rare else None,
                       size=max(4.0, min(40.0, 60_000 / max(data.n_obs, 1))))
        axes.set(title=f"{title}, n = {data.n_obs:,} cells", xlabel="UMAP 1", ylabel="UMAP 2")
        save(figure, path)


def compute_umap(data: anndata.AnnData, *, seed: int = 0) -> anndata.AnnData:
    """At most `CELLS_MAX` of the cells, with scanpy's UMAP of X in `obsm["X_umap"]`; one that is there already stays.

    X is taken as standardised: PCA, 15 neighbours, UMAP, all from one seed.
    """
    import scanpy

    if data.n_obs > CELLS_MAX:
        rows = np.sort(np.random.default_rng(seed).choice(data.n_obs, CELLS_MAX, replace=False))
        data = data[rows].copy()
    if "X_umap" in data.obsm:
        return data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba and umap on threads and seeds
        scanpy.pp.pca(data, n_comps=max(1, min(30, min(data.shape) - 1)), random_state=seed)
        scanpy.pp.neighbors(data, n_neighbors=min(15, max(2, data.n_obs - 1)), random_state=seed)
        scanpy.tl.umap(data, random_state=seed)
    return data


def draw_evaluation(folder: Path, labels: Sequence[str], confusion: Ints, *, bars: Sequence[Any], error: float,
                    threshold: float, unit: str = "cells") -> list[str]:
    """Confusion matrix, F1 and reliability of an evaluation, as PNG and SVG; returns the names of the PNGs."""
    scores, support = compute_class_scores(confusion)
    for kind in ("png", "svg"):
        plot_confusion(confusion, labels, folder / f"confusion.{kind}", title=f"Validation {unit} of all sites",
                       unit=unit)
        plot_f1({"swarm": scores}, labels, support, folder / f"f1.{kind}", unit=unit)
        plot_reliability(bars, folder / f"reliability.{kind}", error=error, threshold=threshold, unit=unit)
    return ["confusion.png", "f1.png", "reliability.png"]


def save(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all, without date or version. Raises `ConfigError` if the folder cannot be."""
    kind = path.suffix.removeprefix(".")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    metadata: dict[str, Any] = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format=kind, metadata=metadata)
        temporary.replace(path)
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}", hint="check permissions and free space") from exc
    finally:
        temporary.unlink(missing_ok=True)


def _to_numbers(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def shorten_all(labels: Sequence[str]) -> list[str]:
    """Labels on at most two lines of 26 characters; whole ones, where two would look the same."""
    found = [textwrap.fill(label, 26, max_lines=2, placeholder=" …", break_on_hyphens=False) for label in labels]
    return found if len(set(found)) == len(found) else list(labels)


def _add_counts(labels: Sequence[str], counts: Sequence[int] | Ints) -> list[str]:
    return [f"{label} ({n:,})" for label, n in zip(shorten_all(labels), counts, strict=True)]


def _format_share(share: float) -> str:
    return "1" if share >= 0.995 else "<.01" if share < 0.01 else f"{share:.2f}".lstrip("0")
