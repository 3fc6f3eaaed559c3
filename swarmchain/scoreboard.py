"""What a benchmark found, for people: a table for a terminal, one for a page, and a figure."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from swarmchain.config import write_file

ARMS = (("central", "central"), ("swarm", "swarm"), ("linear", "linear"), ("local_mean", "local\nmean"),
        ("local_worst", "worst\nlocal"))
METRICS = {"auroc": "AUROC", "macro_f1": "macro-F1"}
# what a site may make of the swarm's model: see `stacking`
HOME = {"swarm_own_shares": "own shares", "swarm_trained_on": "trained on", "swarm_stacked": "mixture"}
# Okabe & Ito's colours, told apart by most colour-blind readers
COLOURS = {"central": "#0072b2", "swarm": "#d55e00", "linear": "#009e73", "local_mean": "#cc79a7",
           "local_worst": "#999999"}


def format_tables(found: Mapping[str, Any]) -> list[Table]:
    """The arms beside each other, the differences with their intervals, and what each site sees at home."""
    is_donor = found["task"] == "donor"
    tables = [_format_donors(found)] if is_donor else [_format_arms(found), _format_differences(found)]
    if found["home"]:
        tables.append(_format_home(found))
    if found["left_out"]:
        tables.append(_format_left_out(found))
    return tables


def _format_arms(found: Mapping[str, Any]) -> Table:
    arms, seeds = found["arms"], found["settings"]["seeds"]
    table = _start(f"F1 on the same held-out cells, mean of {seeds} seed{'s' * (seeds > 1)}",
                   caption=f"linear: logistic regression on pooled cells; worst local: {arms['local_worst']['site']}")
    table.add_column("cell type (cells)", no_wrap=True, vertical="bottom")
    for key, words in ARMS:
        table.add_column(words, justify="right", style="green" if key == "swarm" else "", vertical="bottom",
                         no_wrap=True)
    table.add_row("macro-F1", *(_number(arms[k]["macro_f1"]) for k, _ in ARMS), style="bold")
    table.add_row("± SD of seeds", *(_number(arms[k]["sd"]) for k, _ in ARMS), end_section=True)
    for label, cells in found["support"].items():
        table.add_row(f"{label} ({cells})", *(_number(arms[k]["per_class"].get(label)) for k, _ in ARMS))
    return table


def _format_donors(found: Mapping[str, Any]) -> Table:
    metrics = [metric for metric in METRICS if metric in found["arms"]["swarm"]]
    seeds, folds = found["settings"]["seeds"], found["folds"]
    how = "" if folds == 1 else f", {folds} folds {'together' if found['pools_folds'] else 'by themselves'}"
    count = sum(found["support"].values())
    table = _start(f"{count} held-out samples, mean ± SD of {seeds} seed{'s' * (seeds > 1)}{how}",
                   caption="swarm less each: 95 %, paired bootstrap over samples; linear: logistic regression, pooled "
                           f"samples; worst local: {found['arms']['local_worst']['site']}")
    table.add_column("arm", no_wrap=True)
    for metric in metrics:
        table.add_column(METRICS[metric], justify="right", no_wrap=True)
        table.add_column("swarm less it", justify="right", no_wrap=True)
    for key, words in ARMS:
        row = [words.replace("\n", " ")]
        for metric in metrics:
            entry = _get_part(found, "differences", metric).get(f"swarm - {key}")
            row += [_format_mean(found["arms"][key], metric),
                    "" if entry is None else f"{entry['value']:+.3f} ({entry['low']:+.3f} to {entry['high']:+.3f})"]
        table.add_row(*row, style="green" if key == "swarm" else "")
    return table


def _get_part(found: Mapping[str, Any], part: str, metric: str) -> Mapping[str, Any]:
    """`intervals` or `differences` of a metric: those of macro-F1 stand at the top."""
    chosen: Mapping[str, Any] = found[part] if metric == "macro_f1" else found[metric][part]
    return chosen


def _format_mean(arm: Mapping[str, Any], metric: str) -> str:
    spread = arm["sd" if metric == "macro_f1" else f"sd_{metric}"]
    return f"{arm[metric]:.3f}" + (f" ± {spread:.3f}" if len(arm["seeds"]) > 1 else "")


def _format_differences(found: Mapping[str, Any]) -> Table:
    table = _start("macro-F1, swarm less each other arm", caption="95 %, paired bootstrap over test cells")
    for head in ("less", "difference", "95 % interval"):
        table.add_column(head, justify="left" if head == "less" else "right")
    for name, entry in found["differences"].items():
        table.add_row(name.removeprefix("swarm - "), f"{entry['value']:+.3f}",
                      f"{entry['low']:+.3f} to {entry['high']:+.3f}")
    return table


def _format_home(found: Mapping[str, Any]) -> Table:
    if found["task"] == "donor":
        table = _start(f"home against swarm: {METRICS[found['home_metric']]} on own validation samples")
        for head in ("site", "trainings", "trained alone", "swarm", "gain"):
            table.add_column(head, justify="left" if head == "site" else "right")
        for name, entry in found["home"].items():
            table.add_row(name, str(entry["trainings"]), _number(entry["local"]), _number(entry["swarm"]),
                          f"{entry['difference']:+.3f}")
        return table
    table = _start("home against swarm: macro-F1 on own validation cells")
    heads = [words for name in ("swarm", *HOME.values()) for words in (name, "gain")]
    for head in ("site", "cells", "trained alone", *heads):
        table.add_column(head, justify="left" if head == "site" else "right")
    for name, entry in found["home"].items():
        columns = [(_number(entry[key]), f"{entry[key] - entry['local']:+.3f}") if key in entry else ("–", "–")
                   for key in ("swarm", *HOME)]
        table.add_row(name, str(entry["cells"]), _number(entry["local"]), *(words for two in columns for words in two))
    return table


def _format_left_out(found: Mapping[str, Any]) -> Table:
    table = _start("leave one site out: macro-F1 on its held-out cells")
    for head in ("site", "cells", "swarm of the others", "swarm of all"):
        table.add_column(head, justify="left" if head == "site" else "right")
    for name, entry in found["left_out"].items():
        table.add_row(name, str(entry["cells_without"]), _number(entry["without"]), _number(entry["with"]))
    return table


def format_row(found: Mapping[str, Any], *, metric: str = "macro_f1") -> list[str]:
    """One line of a page's table: every arm's mean ± SD, and the difference to central."""
    entry = _get_part(found, "differences", metric)["swarm - central"]
    return [*(_format_mean(found["arms"][key], metric) for key, _ in ARMS),
            f"{entry['value']:+.3f} ({entry['low']:+.3f} to {entry['high']:+.3f})"]


def write_figure(path: Path, found: Mapping[str, Any]) -> None:
    """A PNG: every arm's macro-F1 with its interval and its seeds; F1 of every class. Raises `ConfigError`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(found["support"])
    figure = Figure(figsize=(11, max(3.6, 1.2 + 0.42 * len(labels))), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1, 1.25)})
    is_donor = found["task"] == "donor"
    _draw_arms(left, found, "auroc" if "auroc" in found["arms"]["swarm"] else "macro_f1")
    if is_donor:
        _draw_arms(right, found, "macro_f1")
    else:
        _draw_classes(right, found, labels)
    figure.suptitle(f"{found['dataset']}: {len(found['sites'])} sites, {sum(found['support'].values())} held-out "
                    f"{'samples' if is_donor else 'cells'}",
                    x=0.01, ha="left", fontweight="bold")
    buffer = io.BytesIO()
    figure.set_canvas(FigureCanvasAgg(figure))
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_file(path, buffer.getvalue())


def _draw_arms(axes: Any, found: Mapping[str, Any], metric: str) -> None:
    names = [key for key, _ in ARMS]
    seeds = "seeds" if metric == "macro_f1" else f"seeds_{metric}"
    for row, key in enumerate(names):
        interval, arm = _get_part(found, "intervals", metric)[key], found["arms"][key]
        axes.plot([interval["low"], interval["high"]], [row, row], color=COLOURS[key], lw=2.5, solid_capstyle="butt")
        axes.plot(arm[seeds], [row] * len(arm[seeds]), "|", color=COLOURS[key], ms=9, mew=1)
        axes.plot(arm[metric], row, "o", color=COLOURS[key], ms=7)
        axes.annotate(f"{arm[metric]:.3f}", (arm[metric], row), xytext=(0, 9), textcoords="offset points",
                      ha="center", fontsize=9)
    axes.set_yticks(range(len(names)), [words.replace("\n", " ") for _, words in ARMS])
    axes.set_ylim(len(names) - 0.4, -0.8)
    if axes.get_xlim()[1] > 1:  # no score is above 1: room for the mark, and no more
        axes.set_xlim(right=1 + 0.03 * (1 - min(axes.get_xlim()[0], 0.95)))
    what = "samples" if found["task"] == "donor" else "cells"
    axes.set_xlabel(f"{METRICS[metric]}; line: 95 % over test {what}, ticks: seeds")
    _clean(axes)


def _draw_classes(axes: Any, found: Mapping[str, Any], labels: list[str]) -> None:
    marks = {"central": "D", "swarm": "o", "linear": "s", "local_mean": "^"}
    offsets = {"central": -0.18, "swarm": -0.06, "linear": 0.06, "local_mean": 0.18}
    for key, mark in marks.items():
        values = [found["arms"][key]["per_class"].get(label) for label in labels]
        rows = [row + offsets[key] for row, value in enumerate(values) if value is not None]
        axes.plot([v for v in values if v is not None], rows, mark, color=COLOURS[key], ms=6,
                  label=dict(ARMS)[key].replace("\n", " "))
    axes.set_yticks(range(len(labels)), [f"{label} ({found['support'][label]})" for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("F1 by class (held-out cells)")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, 1.13), ncols=4, handletextpad=0.2,
                columnspacing=1.0)
    _clean(axes)


def _clean(axes: Any) -> None:
    axes.grid(axis="x", color="#dddddd", lw=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)


def _start(title: str, *, caption: str = "") -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, caption=caption or None,
                 caption_justify="left")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
