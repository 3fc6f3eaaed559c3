"""`swarmchain run export`."""

from __future__ import annotations

from pathlib import Path

import click

from swarmchain.cli.common import connect, example, json_option, load, open_sealed, print_json, site_option


@click.command(epilog=example("swarmchain run export 2 --site north/site.toml --out model --evaluation 3"))
@click.argument("number", type=click.IntRange(min=1))
@site_option
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write.")
@click.option("--evaluation", "evaluation", type=click.IntRange(min=1),
              help="A finished evaluation of this model: F1 per class, calibration, unknown threshold, pictures.")
@json_option
def export(number: int, site_file: Path, out: Path, evaluation: int | None, as_json: bool) -> None:
    """Write a run's model: checkpoint, spec, the certificate of how it came about, and a model card."""
    from swarmchain.evaluating import read_trained
    from swarmchain.release import build_release, draw_release, write_release

    config = load(site_file)
    contract = connect(config)
    store = open_sealed(config, contract, number)
    view = contract.view_run(number)
    spec = read_trained(store, view)
    release = build_release(contract, store, view, spec, config=config,
                            evaluation=contract.view_run(evaluation) if evaluation else None)
    pictures = draw_release(out, release)
    files = write_release(out, release, pictures=pictures)
    if as_json:
        print_json({"run": number, "round": view.finalized_round, "checkpoint": view.checkpoint, "out": str(out),
                    "files": [*files, *pictures], "card": release.card.model_dump(mode="json")})
        return
    click.echo(f"run {number}, round {view.finalized_round}: checkpoint {view.checkpoint}")
    found, unit = release.card.evaluation, "samples" if release.card.task == "donor" else "cells"
    if found is None:
        click.echo("no evaluation: confidences are not calibrated, and nothing is marked unknown")
    else:
        click.echo(f"macro-F1 {found.macro_f1:.3f} on {found.cells} validation {unit}; temperature "
                   f"{found.temperature}; unknown below {found.threshold}"
                   + ("" if found.is_reached else " (the target was not reached)"))
    click.echo(f"wrote {', '.join([f'{out}/{files[0]}', *files[1:], *pictures])}")
