"""`swarmchain run statistics`: what the consortium agreed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swarmchain.cli.common import connect, example, json_option, load, open_sealed, print_json, site_option

FLAVORS = ("seurat", "cell_ranger")


@click.command(epilog=example("swarmchain run statistics 1 --site north/site.toml"))
@click.argument("number", type=click.IntRange(min=1))
@site_option
@click.option("--features-at", type=click.IntRange(min=1), default=2, show_default=True,
              help="Highly variable genes: among the features that at least so many sites have.")
@click.option("--flavor", type=click.Choice(FLAVORS), default=FLAVORS[0], show_default=True,
              help="Highly variable genes: scanpy's flavour, with its default cutoffs.")
@json_option
def statistics(number: int, site_file: Path, features_at: int, flavor: Any, as_json: bool) -> None:
    """What a finished statistics run found: cells, donors and sites of every label, and features by sites.

    Donors count at every site that knows its donors; somebody who gave cells at two sites counts twice.
    """
    from swarmchain.planning import read_statistics, summarize_statistics

    config = load(site_file)
    contract = connect(config)
    view = contract.view_run(number)
    source = read_statistics(open_sealed(config, contract, number), view)
    found = {"run": number, "checkpoint": view.checkpoint,
             **summarize_statistics(*source, sites_min=features_at, flavor=flavor)}
    if as_json:
        print_json(found)
        return
    width = max(len(label) for label in found["labels"])
    click.echo(f"{'':<{width}}  {'cells':>9}  {'donors':>6}  sites")
    for label, row in [*found["labels"].items(), ("in all", found["in_all"])]:
        click.echo(f"{label:<{width}}  {row['cells']:>9}  {row['donors'] or '-':>6}  {row['sites']:>5}")
    for sites, count in found["features_at"].items():
        click.echo(f"{count} features at {sites} or more sites")
    if found["highly_variable"] is not None:
        click.echo(f"{found['highly_variable']} highly variable ({flavor}) among those at {features_at} or more sites")
