"""`swarmchain run compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmchain.cli.common import connect, example, json_option, load, open_sealed, print_json, site_option

if TYPE_CHECKING:
    from swarmchain.comparing import Comparison

TRAINED_ON_ROUNDS = 10  # as baselines.TRAINED_ON_ROUNDS, which takes long to import
MIXED = ("this site's own", "the swarm's", "the swarm's with own shares", "the swarm's trained on")  # stacking.MODELS
SCORES = {"macro_f1": "macro-F1", "auroc": "AUROC"}


@click.command(epilog=example("swarmchain run compare 2 --site north/site.toml"))
@click.argument("number", type=click.IntRange(min=1))
@site_option
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="Folder for a picture of F1 per class.")
@click.option("--local-rounds", type=click.IntRange(min=1), default=TRAINED_ON_ROUNDS, show_default=True,
              help="How many the swarm's model is trained on, on this site's cells alone.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False),
              help="Models of cells: folder to write the mixture to, for `predict --home`.")
@json_option
def compare(number: int, site_file: Path, plots: Path | None, local_rounds: int, out: Path | None, as_json: bool
            ) -> None:
    """Home against swarm: say whether this site gains by a run, on its own validation cells or donors.

    Trains a model on this site's cells alone, with the swarm's code, rounds and steps, and scores both. Beside them the
    swarm's model, told this site's own shares of the classes, the same trained on here, and a mixture of all of them.
    Nothing leaves the site, and nothing is signed.
    """
    from swarmchain.comparing import compare_site
    from swarmchain.evaluating import read_trained
    from swarmchain.keys import read_address
    from swarmchain.spec import CellTypeSpec
    from swarmchain.stacking import write_home

    config = load(site_file)
    contract = connect(config)
    store = open_sealed(config, contract, number)
    view = contract.view_run(number)
    spec = read_trained(store, view)
    site = contract.get_site_index(read_address(config.resolve(config.keys.keystore)))
    if out is not None and not isinstance(spec, CellTypeSpec):
        raise click.UsageError("--out goes with models of cells, and this run's calls donors")
    found = compare_site(config, store, view, spec, site=site, rounds=local_rounds)
    if out is not None and isinstance(spec, CellTypeSpec) and found.mixture is not None:
        write_home(out, found.mixture, spec)
    if plots is not None:
        from swarmchain.plots import plot_f1

        for kind in ("png", "svg"):
            plot_f1({"swarm": found.swarm_f1, "home": found.home_f1}, found.labels, found.support,
                    plots / f"home-against-swarm.{kind}", title=f"Home against swarm, {found.site}", unit=found.unit)
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found)
        if out is not None:
            click.echo(f"wrote {out}: `swarmchain predict MODEL_DIR CELLS --home {out}` calls new cells of this site")


def _print(found: Comparison) -> None:
    width = max(len(label) for label in (*found.labels, "macro-F1"))
    click.echo(f"{'':<{width}}  {found.unit:>7}  {'home':>6}  {'swarm':>6}  {'gain':>7}")
    for label, n, home, swarm in zip(found.labels, found.support, found.home_f1, found.swarm_f1, strict=True):
        if home is not None and swarm is not None:
            click.echo(f"{label:<{width}}  {n:>7}  {home:>6.3f}  {swarm:>6.3f}  {swarm - home:>+7.3f}")
    click.echo(f"{'macro-F1':<{width}}  {found.cells:>7}  {found.home:>6.3f}  {found.swarm:>6.3f}  "
               f"{found.swarm - found.home:>+7.3f}")
    if found.areas is not None:
        home, swarm = found.areas
        click.echo(f"{'AUROC':<{width}}  {found.cells:>7}  {home:>6.3f}  {swarm:>6.3f}  {found.difference:>+7.3f}")
    drawn = "cells" if found.unit == "cells" else "donors, each with all its samples"
    click.echo(f"95 % of the differences in {SCORES[found.score]} lie in {found.low:+.3f} to {found.high:+.3f} "
               f"(bootstrap over the {drawn})")
    for name, variant in found.variants.items():
        how = {"own_shares": "told this site's own shares of the classes",
               "trained_on": f"trained {found.trained_on_rounds} rounds more on this site's cells",
               "stacked": "mixed with those and this site's own"}[name]
        click.echo(f"the swarm's model, {how}: {variant.macro_f1:.3f}, gain {variant.macro_f1 - found.home:+.3f} "
                   f"({variant.low:+.3f} to {variant.high:+.3f})")
    if found.mixture is not None:
        parts = zip(MIXED, found.mixture.card.weights, strict=True)
        click.echo(f"the mixture: {', '.join(f'{weight:.0%} {words}' for words, weight in parts if weight >= 0.005)}")
    words = {
        "gains": f"{found.site} gains: the swarm's model calls its {found.unit} better than one of its own.",
        "loses": f"{found.site} loses: a model of its own calls its {found.unit} better than the swarm's.",
        "undecided": f"{found.site}: too close to tell; {found.cells} validation {found.unit} cannot show a "
                     "difference.",
    }
    click.echo(words[found.verdict])
