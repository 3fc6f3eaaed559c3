"""`swarmchain predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swarmchain.cli.common import example, json_option, print_json

STATES = ("auto", "counts", "log1p", "arcsinh", "intensities", "proportions", "none")
SAMPLES_SHOWN = 20


@click.command(epilog=example("swarmchain predict model new.h5ad --out annotated.h5ad --plots plots"))
@click.argument("folder", metavar="MODEL_DIR", type=click.Path(path_type=Path))
@click.argument("path", metavar="CELLS", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True,
              help="AnnData file (.h5ad) to write: the input, with the calls added.")
@click.option("--layer", help="Use this layer in place of X.")
@click.option("--state", type=click.Choice(STATES), default="auto", show_default=True,
              help="What X or the layer holds; auto tells from the numbers.")
@click.option("--share-min", type=click.FloatRange(0, 1), show_default="the spec's",
              help="Share of the panel that must be there.")
@click.option("--batch", type=click.IntRange(min=1), default=8192, show_default=True, help="Cells in memory at a time.")
@click.option("--truth", "column", help="Column with labels to score the calls against, in the model's words.")
@click.option("--donor-column", help="Models of donors: column with the donor of each cell.")
@click.option("--sample-column", help="Models of donors: column that tells the samples of one donor apart.")
@click.option("--cell-type-column", help="Models with attention: column with the types of cells to sum it over.")
@click.option("--samples-out", type=click.Path(path_type=Path, dir_okay=False),
              help="Models of donors: CSV to write, a row for each sample.")
@click.option("--home", "home_folder", type=click.Path(path_type=Path, file_okay=False),
              help="Models of cells: a site's mixture, as `run compare --out` wrote it, for new cells of that site.")
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False),
              help="Folder for UMAPs of the calls; of at most 20,000 cells.")
@json_option
def predict(folder: Path, path: Path, out: Path, layer: str | None, state: str, share_min: float | None, batch: int,
            column: str | None, donor_column: str | None, sample_column: str | None, cell_type_column: str | None,
            samples_out: Path | None, home_folder: Path | None, plots: Path | None, as_json: bool) -> None:
    """Call the cells or donors of a file with a model that `run export` wrote; no chain and no key are needed.

    CELLS is .h5ad, .zarr, .fcs or a folder of them, a 10x folder or .h5, .csv or .tsv. Adds obs columns swarm_label,
    swarm_confidence and swarm_unknown, obsm swarm_probabilities and uns swarmchain; X, layers and all else stay as they
    are. A model of donors calls samples: each cell carries its sample's call and, with attention, its share in it
    (swarm_attention).
    """
    from swarmchain.calls import Settings, annotate, read_truth, require_free, score_calls, summarize
    from swarmchain.card import read_model_folder
    from swarmchain.predict import call_cells, draw_calls, draw_confusion
    from swarmchain.predict_donors import (
        call_samples,
        draw_samples,
        group_truth,
        summarize_samples,
        write_samples,
    )
    from swarmchain.spec import CellTypeSpec
    from swarmchain.stacking import read_home

    model = read_model_folder(folder)
    of_donors = {"--donor-column": donor_column, "--sample-column": sample_column,
                 "--cell-type-column": cell_type_column, "--samples-out": samples_out}
    if model.card.task != "donor" and any(of_donors.values()):
        named = next(name for name, value in of_donors.items() if value)
        raise click.UsageError(f"{named} goes with models of donors, and this model calls single cells")
    settings = Settings(layer, state, share_min, batch, donor_column, sample_column, cell_type_column, column)
    if home_folder is not None and not isinstance(model.spec, CellTypeSpec):
        raise click.UsageError("--home goes with models of cells, and this model calls donors")
    home = read_home(home_folder, model.spec, checkpoint=model.card.provenance.checkpoint) if home_folder is not None \
        and isinstance(model.spec, CellTypeSpec) else None
    model = model.drop_evaluation() if home else model
    require_free(path, out)
    samples = call_samples(model, path, settings) if model.card.task == "donor" else None
    calls = samples.spread() if samples else call_cells(model, path, settings, home=home)
    truth = read_truth(path, settings, calls.labels) if column else None
    scored, unit = (truth, samples.calls if samples else calls), "samples" if samples else "cells"
    if samples and truth:
        scored = (group_truth(truth, samples.owners, source=path), samples.calls)
    annotate(path, out, model, calls, settings)
    if samples and samples_out:
        write_samples(samples_out, samples)
    pictures = draw_calls(plots, model, path, calls, settings, truth=truth,
                          attention=samples.compute_emphasis() if samples else None) if plots else []
    if plots and scored[0]:
        pictures += draw_confusion(plots, scored[0], scored[1], unit=unit)
    if plots and samples:
        pictures += draw_samples(plots, samples)
    said = {**(summarize_samples(model, samples) if samples else summarize(model, calls)), "out": str(out),
            "samples_out": str(samples_out) if samples_out else None, "plots": [str(p) for p in pictures],
            "truth": score_calls(scored[0], scored[1], unit=unit) if scored[0] else None,
            "home": {"site": home.card.site, "weights": home.weights} if home else None}
    if as_json:
        print_json(said)
    else:
        _print(said, unit)


def _print(said: dict[str, Any], unit: str) -> None:
    features = said["features"]
    click.echo(f"{said['cells']} cells, {features['found']} of the panel's {features['panel']} features, "
               f"X holds {said['state']}")
    width = max(len(label) for label in said["labels"])
    for label, row in said["labels"].items():
        if row[unit]:
            unknown = f"  ({row['unknown']} unknown)" if row["unknown"] else ""
            click.echo(f"  {label:<{width}}  {row[unit]:>8}{unknown}")
    if unit == "samples":
        _print_samples(said["samples"])
    if said["is_calibrated"]:
        click.echo(f"{said['unknown']} unknown: confidence below {said['threshold']}")
    elif said["home"]:
        click.echo(f"called by {said['home']['site']}'s mixture; nothing is marked unknown")
    else:
        click.echo("the model comes without an evaluation: confidences are not calibrated, nothing is marked unknown")
    if truth := said["truth"]:
        score = "" if truth["macro_f1"] is None else f", macro-F1 {truth['macro_f1']:.3f}"
        score += "" if truth.get("auroc") is None else f", AUROC {truth['auroc']:.3f}"
        click.echo(f"against {truth['column']}: {truth[unit]} {unit} with labels that the model knows{score}")
        if truth["foreign"][unit]:
            click.echo(f"  {truth['foreign'][unit]} {unit} carry labels that the model does not know, "
                       f"{truth['foreign']['unknown']} of them are marked unknown")
    written = [said["out"], said["samples_out"], *said["plots"]]
    click.echo(f"wrote {', '.join(name for name in written if name)}")


def _print_samples(rows: list[dict[str, Any]]) -> None:
    """The first samples; all are in the files."""
    width = max(len(row["sample"]) for row in rows[:SAMPLES_SHOWN])
    for row in rows[:SAMPLES_SHOWN]:
        shares = list(row.get("attention", {}).items())[:3]
        carried = f"  {', '.join(f'{kind} {share:.0%}' for kind, share in shares)}" if shares else ""
        unknown = " unknown" if row["unknown"] else ""
        click.echo(f"    {row['sample']:<{width}}  {row['label']} {row['confidence']:.2f}{unknown}{carried}")
    if len(rows) > SAMPLES_SHOWN:
        click.echo(f"    and {len(rows) - SAMPLES_SHOWN} more: --samples-out writes all")
