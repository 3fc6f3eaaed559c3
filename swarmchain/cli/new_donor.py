"""`swarmchain run new donor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swarmchain.cli.common import connect, example, load, open_sealed, site_option
from swarmchain.config import write_file

MODELS = ("perceptron", "attention", "deep_sets", "pseudobulk")


@click.command(epilog=example(
    "swarmchain run new donor --site north/site.toml --statistics 1 --model attention", "--out donors.json"))
@site_option
@click.option("--statistics", "source", type=click.IntRange(min=1), required=True,
              help="A finished statistics run that was split by donor.")
@click.option("--model", "kind", type=click.Choice(MODELS), default="perceptron", show_default=True,
              help="One row per sample, or a bag of cells; docs/donors.md tells what each is for.")
@click.option("--hidden", type=click.IntRange(min=1), multiple=True,
              help="Width of a hidden layer; repeatable. Default: none, so that what is left is linear.")
@click.option("--encoder", type=click.IntRange(min=1), multiple=True, default=(64,), show_default=True,
              help="attention, deep_sets: width of a layer that every cell passes; repeatable.")
@click.option("--bag-size", type=click.IntRange(min=1), default=64, show_default=True,
              help="Cells of a bag that a step draws.")
@click.option("--name", default="donors", show_default=True, help="What the sites call it.")
@click.option("--rounds", type=click.IntRange(min=1), default=40, show_default=True, help="Rounds to train.")
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Batches per round.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Samples of a batch.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=1e-3, show_default=True,
              help="Learning rate in the first round.")
@click.option("--proximal", type=click.FloatRange(min=0), default=0.0, show_default=True, help="FedProx's μ.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all randomness in training.")
@click.option("--features-at", type=click.IntRange(min=1), default=2, show_default=True,
              help="Panel: features that at least so many sites have.")
@click.option("--labels-min", type=click.IntRange(min=1), default=2, show_default=True,
              help="Labels that a site's training samples must have.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The spec to write.")
def donor(site_file: Path, source: int, kind: str, out: Path, **options: Any) -> None:
    """A run that trains a classifier of donors: condition or diagnosis, from one row or a bag of cells each."""
    from swarmchain.planning import plan_donor, read_statistics
    from swarmchain.spec import Limits, Training, encode_spec, parse_donor_model

    config = load(site_file)
    contract = connect(config)
    # every site must be able to read both before it joins
    store = open_sealed(config, contract, None)
    view = contract.view_run(source)
    encoder = {"encoder": options["encoder"]} if kind in ("attention", "deep_sets") else {}
    spec, blob = plan_donor(
        read_statistics(store, view), view, name=options["name"], sites_per_feature_min=options["features_at"],
        model=parse_donor_model({"kind": kind, "hidden": options["hidden"], **encoder}),
        bag_size=options["bag_size"], labels_min=options["labels_min"],
        limits=Limits(rounds=options["rounds"], sites_to_start=len(view.joined)),
        training=Training(**{key: options[key] for key in ("seed", "steps", "batch_size", "lr", "proximal")}),
    )
    store.put_blob(blob)
    write_file(out, encode_spec(spec))
    click.echo(f"wrote {out}: {kind}, {len(spec.panel.features)} features, {len(spec.labels)} labels, score "
               f"{spec.score}; seed checkpoint {spec.seed_checkpoint[:12]}… is in the store")
