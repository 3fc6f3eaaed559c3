"""What several commands that plan a run share: options, and the spec that they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from swarmchain.cli.common import connect
from swarmchain.config import SiteConfig

if TYPE_CHECKING:
    from swarmchain.spec import CellTypeSpec

# what the spec offers, without its libraries: help must come at once
MERGES = ("clipped_mean", "mean", "coordinate_median", "trimmed_mean", "geometric_median", "multi_krum",
          "centered_clipping")
CODECS = ("float32", "float16", "int8")
OUTERS = ("none", "momentum", "nesterov", "fedadam")


def merge_options(command: Callable[..., None]) -> Callable[..., None]:
    """How contributions travel and become a checkpoint; the finer settings stand in the spec that is written."""
    for name, choices, words in (("--outer", OUTERS, "Outer optimiser on the merged delta."),
                                 ("--codec", CODECS, "How contributions are coded."),
                                 ("--merge", MERGES, "Merge method; docs/merge.md tells what each is for.")):
        default, kind = choices[0], click.Choice(choices)
        into = ["method"] if name == "--merge" else []
        command = click.option(name, *into, type=kind, default=default, show_default=True, help=words)(command)
    return command


def cell_type_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a cell-type classifier is made of."""
    command = merge_options(command)
    for option in (
        click.option("--features-at", type=click.IntRange(min=1), default=2, show_default=True,
                     help="Panel: features that at least so many sites have."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
                     help="Of all randomness in training."),
        click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=1e-3, show_default=True,
                     help="Learning rate in the first round."),
        click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True,
                     help="Minibatches per round."),
        click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True, help="Rounds to train."),
        click.option("--name", default="cell types", show_default=True, help="What the sites call it."),
        click.option("--statistics", "source", type=click.IntRange(min=1), required=True,
                     help="A finished statistics run."),
    ):
        command = option(command)
    return command


def make_cell_type(config: SiteConfig, *, source: int, name: str, rounds: int, steps: int, lr: float, seed: int,
                   features_at: int, **merging: Any) -> CellTypeSpec:
    """The spec on what run `source` found; its seed checkpoint goes into the store."""
    from swarmchain.merging import parse_merge
    from swarmchain.planning import plan_cell_type, read_statistics
    from swarmchain.spec import Limits, Training
    from swarmchain.store import Store

    store = Store(config.store_url)
    view = connect(config).view_run(source)
    spec, blob = plan_cell_type(
        read_statistics(store, view), view, name=name, sites_per_feature_min=features_at,
        limits=Limits(rounds=rounds, sites_to_start=len(view.joined)),
        training=Training(seed=seed, steps=steps, lr=lr), codec=merging["codec"],
        merge=parse_merge({"method": merging["method"], "outer": {"kind": merging["outer"]}}),
    )
    store.put_blob(blob)
    return spec
