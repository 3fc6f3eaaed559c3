"""`swarmchain predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swarmchain.cli.common import example, json_option, print_json

STATES = ("auto", "counts", "log1p", "arcsinh", "none")


@click.command(epilog=example("swarmchain predict model new.h5ad --out annotated.h5ad --plots plots"))
@click.argument("folder", metavar="MODEL_DIR", type=click.Path(path_type=Path))
@click.argument("path", metavar="CELLS", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True,
              help="AnnData file to write: the input, with the calls added.")
@click.option("--layer", help="Use this layer in place of X.")
@click.option("--state", type=click.Choice(STATES), default="auto", show_default=True,
              help="What X or the layer holds; auto tells from the numbers.")
@click.option("--share-min", type=click.FloatRange(0, 1), show_default="the spec's",
              help="Share of the panel that must be there.")
@click.option("--batch", type=click.IntRange(min=1), default=8192, show_default=True, help="Cells in memory at a time.")
@click.option("--truth", "column", help="Column of obs with labels to score the calls against, in the model's words.")
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False),
              help="Folder for UMAPs of the calls; of at most 20,000 cells.")
@json_option
def predict(folder: Path, path: Path, out: Path, layer: str | None, state: str, share_min: float | None, batch: int,
            column: str | None, plots: Path | None, as_json: bool) -> None:
    """Call the cells of a file with a model that `run export` wrote; no chain and no key are needed.

    Adds obs columns swarm_label, swarm_confidence and swarm_unknown, obsm swarm_probabilities and uns swarmchain; X,
    layers and all else stay as they are.
    """
    from swarmchain.card import read_model_folder
    from swarmchain.predict import (
        Settings,
        annotate,
        call_cells,
        draw_calls,
        read_truth,
        require_free,
        score_calls,
        summarize,
    )

    model = read_model_folder(folder)
    settings = Settings(layer=layer, state=state, share_min=share_min, batch=batch)
    require_free(path, out)
    calls = call_cells(model, path, settings)
    truth = read_truth(path, column, calls.labels) if column else None
    annotate(path, out, model, calls)
    pictures = draw_calls(plots, model, path, calls, settings, truth=truth) if plots else []
    said = {**summarize(model, calls), "out": str(out), "plots": [str(p) for p in pictures],
            "truth": score_calls(truth, calls) if truth else None}
    if as_json:
        print_json(said)
    else:
        _print(said)


def _print(said: dict[str, Any]) -> None:
    features = said["features"]
    click.echo(f"{said['cells']} cells, {features['found']} of the panel's {features['panel']} features, "
               f"X holds {said['state']}")
    width = max(len(label) for label in said["labels"])
    for label, row in said["labels"].items():
        if row["cells"]:
            unknown = f"  ({row['unknown']} unknown)" if row["unknown"] else ""
            click.echo(f"  {label:<{width}}  {row['cells']:>8}{unknown}")
    if said["is_calibrated"]:
        click.echo(f"{said['unknown']} unknown: confidence below {said['threshold']}")
    else:
        click.echo("the model comes without an evaluation: confidences are not calibrated, nothing is marked unknown")
    if truth := said["truth"]:
        score = "" if truth["macro_f1"] is None else f", macro-F1 {truth['macro_f1']:.3f}"
        click.echo(f"against {truth['column']}: {truth['cells']} cells with labels that the model knows{score}")
        if truth["foreign"]["cells"]:
            click.echo(f"  {truth['foreign']['cells']} cells carry labels that the model does not know, "
                       f"{truth['foreign']['unknown']} of them are marked unknown")
    click.echo(f"wrote {', '.join([said['out'], *said['plots']])}")
