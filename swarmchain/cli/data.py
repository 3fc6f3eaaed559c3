"""`swarmchain data`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmchain.cli.common import example, json_option, load, print_json
from swarmchain.config import DataConfig
from swarmchain.errors import ConfigError

if TYPE_CHECKING:
    from swarmchain.inspection import Inspection


@click.group()
def data() -> None:
    """Look at a site's data; nothing leaves the machine."""


@data.command(epilog=example("swarmchain data check cells/North.h5ad --label-column cell_type"))
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--site", "site_file", type=click.Path(path_type=Path, dir_okay=False),
              help="Check what [data] of this site.toml names, with its settings.")
@click.option("--label-column", default="", help="Column that holds the cell type.")
@click.option("--donor-column", help="Column that holds the donor.")
@click.option("--labels", type=click.Path(path_type=Path, dir_okay=False), help="A table of labels beside the file.")
@click.option("--labels-key", help="Its column that names the cells. Default: the first.")
@click.option("--layer", help='A layer in place of X, or "raw".')
@json_option
def check(path: Path | None, site_file: Path | None, label_column: str, donor_column: str | None,
          labels: Path | None, labels_key: str | None, layer: str | None, as_json: bool) -> None:
    """Say what a file of cells holds and what is wrong with it; shows no cell's name, and of X only extremes."""
    from swarmchain.inspection import inspect_data

    if (path is None) == (site_file is None):
        raise ConfigError("name either a path or --site", hint="`swarmchain data check cells/North.h5ad`")
    if site_file is not None:
        settings = load(site_file).cells
        if settings is None:
            raise ConfigError(f"{site_file} has no [data] section", hint="name the site's cells there")
    else:
        settings = DataConfig(path=str(path), label_column=label_column, donor_column=donor_column,
                              labels=str(labels) if labels else None, labels_key=labels_key, layer=layer)
    found = inspect_data(Path(settings.path), settings)
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)


def _print(found: Inspection) -> None:
    click.echo(f"{found.path} ({found.kind}): {found.cells} cells, {found.features} features ({found.names}), "
               f"{found.storage}, {found.dtype}")
    click.echo(f"X: {found.state}: {found.why}")
    for channel, antigen in found.channels:
        click.echo(f"  channel {channel}: {antigen}")
    if found.labels is None:
        click.echo(f"labels: none named; columns: {', '.join(found.columns) or '(none)'}")
    for title, counts in (("labels", found.labels), ("shared labels", found.shared), ("donors", found.donors)):
        if counts is not None and not (title == "shared labels" and counts == found.labels):
            words = ", ".join(f"{name or '(none)'} {n}" for name, n in counts.items())
            click.echo(f"{title} ({len(counts)}): {words or '(none)'}")
    if found.excluded or found.unlabelled:
        click.echo(f"left out: {found.excluded} cells by the mapping, {found.unlabelled} without a label")
    for warning in found.warnings:
        click.echo(f"warning: {warning}")
