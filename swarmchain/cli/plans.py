"""What several commands that plan a run share: options, and the spec that they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from swarmchain.cli.common import connect, open_sealed
from swarmchain.cli.statistics import FLAVORS
from swarmchain.config import SiteCard, SiteConfig

if TYPE_CHECKING:
    from swarmchain.spec import CellTypeSpec, StatisticsSpec

# what the spec offers, without its libraries: help must come at once
MERGES = ("clipped_mean", "mean", "coordinate_median", "trimmed_mean", "geometric_median", "multi_krum",
          "centered_clipping")
CODECS = ("float32", "float16", "int8")
OUTERS = ("none", "momentum", "nesterov", "fedadam")
NORMALIZATIONS = ("log1p", "arcsinh", "proportions", "none")
# the least that a site must have; option, field of `spec.Minimums`, its default, what it says
MINIMUMS = (
    ("--cells-min", "cells", 10, "Training cells without which a site does not take part."),
    ("--donors-min", "donors", 0, "Donors without which a site does not take part; 0 asks for no donors."),
    ("--cells-per-label-min", "cells_per_label", 5, "Training cells without which a site leaves a label out."),
    ("--donors-per-label-min", "donors_per_label", 0, "Donors without which a site leaves a label out."),
)


def merge_options(command: Callable[..., None]) -> Callable[..., None]:
    """How contributions travel and become a checkpoint; the finer settings stand in the spec that is written."""
    for name, choices, words in (("--outer", OUTERS, "Outer optimiser on the merged delta."),
                                 ("--codec", CODECS, "How contributions are coded."),
                                 ("--merge", MERGES, "Merge method; docs/merge.md tells what each is for.")):
        default, kind = choices[0], click.Choice(choices)
        into = ["method"] if name == "--merge" else []
        command = click.option(name, *into, type=kind, default=default, show_default=True, help=words)(command)
    return command


def statistics_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a statistics run is made of, and what a site must have, so that no sum is over a handful of cells."""
    for name, field, default, words in reversed(MINIMUMS):
        command = click.option(name, field, type=click.IntRange(min=min(default, 1)), default=default,
                               show_default=True, help=words)(command)
    for option in (
        click.option("--by-donor", is_flag=True, help="Split by donor, and count samples: for runs on donors."),
        click.option("--cofactor", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True,
                     help="Of arcsinh: 5 is usual for mass, 150 for flow cytometry."),
        click.option("--normalization", "kind", type=click.Choice(NORMALIZATIONS), default=NORMALIZATIONS[0],
                     show_default=True, help="The state that every site brings its values to."),
        click.option("--name", default="statistics", show_default=True, help="What the sites call it."),
    ):
        command = option(command)
    return command


def make_statistics(cards: Sequence[SiteCard], *, name: str, kind: Any, cofactor: float, by_donor: bool,
                    **minimums: int) -> StatisticsSpec:
    """The spec over what the sites' cards name."""
    from swarmchain.planning import plan_statistics
    from swarmchain.spec import Minimums, Normalization

    return plan_statistics(cards, name=name, sites_to_start=len(cards), minimums=Minimums(**minimums),
                           normalization=Normalization(kind=kind, cofactor=cofactor),
                           split_by="donor" if by_donor else "cell")


def cell_type_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a cell-type classifier is made of."""
    command = merge_options(command)
    for option in (
        click.option("--mask", is_flag=True, help="Tell the network which features a site has."),
        click.option("--flavor", type=click.Choice(FLAVORS), default=FLAVORS[0], show_default=True,
                     help="With --hvg: which of scanpy's ways to find them."),
        click.option("--hvg", type=click.IntRange(min=1), help="Panel: of those, so many highly variable ones."),
        click.option("--features-at", type=click.IntRange(min=1), default=2, show_default=True,
                     help="Panel: features that at least so many sites have."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
                     help="Of all randomness in training."),
        click.option("--lr", type=click.FloatRange(min=0, min_open=True),
                     help="Learning rate in the first round. Default: 0.001, after arcsinh 0.01."),
        click.option("--steps", type=click.IntRange(min=1), default=40, show_default=True,
                     help="Minibatches per round."),
        click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True, help="Rounds to train."),
        click.option("--name", default="cell types", show_default=True, help="What the sites call it."),
        click.option("--statistics", "source", type=click.IntRange(min=1), required=True,
                     help="A finished statistics run."),
    ):
        command = option(command)
    return command


def make_cell_type(config: SiteConfig, *, source: int, name: str, rounds: int, steps: int, lr: float | None, seed: int,
                   features_at: int, hvg: int | None, flavor: Any, mask: bool, **merging: Any) -> CellTypeSpec:
    """The spec on what run `source` found; its seed checkpoint goes into the store."""
    from swarmchain.merging import parse_merge
    from swarmchain.planning import plan_cell_type, read_statistics, recommend_training
    from swarmchain.spec import Limits, Model

    contract = connect(config)
    # every site must be able to read both before it joins
    store = open_sealed(config, contract, None)
    view = contract.view_run(source)
    statistics = read_statistics(store, view)
    training = recommend_training(statistics[0].normalization)
    spec, blob = plan_cell_type(
        statistics, view, name=name, sites_per_feature_min=features_at, hvg=hvg, flavor=flavor,
        limits=Limits(rounds=rounds, sites_to_start=len(view.joined)),
        training=training.model_copy(update={"seed": seed, "steps": steps, "lr": lr or training.lr}),
        model=Model(mask=mask), codec=merging["codec"],
        merge=parse_merge({"method": merging["method"], "outer": {"kind": merging["outer"]}}),
    )
    store.put_blob(blob)
    return spec
