"""`swarmchain benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swarmchain.cli.common import example, interrupt_on_signals, print_json


@click.command(epilog=example("swarmchain benchmark --data cells --splits splits.csv --seeds 3 --out benchmark"))
@click.option("--data", type=click.Path(path_type=Path), required=True,
              help="A folder with one .h5ad per site, or one .h5ad of all.")
@click.option("--splits", type=click.Path(path_type=Path, dir_okay=False), required=True,
              help="A table with the columns cell and split (train or test; task donor: or fold), site with a folder.")
@click.option("--task", type=click.Choice(["cell_type", "donor"]), default="cell_type", show_default=True,
              help="What is learned: each cell's type, or one label of each donor's sample.")
@click.option("--site-column", default="site", show_default=True,
              help="Of the table or of .obs, with one file of all: whose a cell is.")
@click.option("--label-column", default="cell_type", show_default=True, help="Of .obs.")
@click.option("--donor-column", help="Of .obs: refuse splits that have a donor on both sides.")
@click.option("--sample-column", help="Of .obs, task donor: where donors gave several samples.")
@click.option("--model", "kind", type=click.Choice(["perceptron", "attention", "deep_sets", "pseudobulk"]),
              default="perceptron", show_default=True, help="Task donor: one row per sample, or a bag of cells.")
@click.option("--bag-size", type=click.IntRange(min=1), default=64, show_default=True,
              help="Task donor: cells of a bag that a step draws.")
@click.option("--labels-min", type=click.IntRange(min=1), default=2, show_default=True,
              help="Task donor: labels that a site's training samples must have.")
@click.option("--cells-per-label", type=click.IntRange(min=1), default=5, show_default=True,
              help="A site leaves out labels of which it has fewer training cells.")
@click.option("--pool-folds", "pools_folds", is_flag=True,
              help="Task donor: score the samples of all folds together, where a fold has few.")
@click.option("--normalization", type=click.Choice(["log1p", "arcsinh", "proportions", "none"]), default="log1p",
              show_default=True, help="What X is brought to.")
@click.option("--cofactor", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True,
              help="Of arcsinh: 5 for mass cytometry, about 150 for flow.")
@click.option("--state", type=click.Choice(["auto", "counts", "log1p", "arcsinh", "none"]), default="auto",
              show_default=True, help="What X holds.")
@click.option("--features-at", type=click.IntRange(min=1), default=3, show_default=True,
              help="The panel is what at least so many sites have.")
@click.option("--rounds", type=click.IntRange(min=1), default=50, show_default=True, help="Rounds of each swarm.")
@click.option("--steps", type=click.IntRange(min=1), help="Minibatches of a site in one round. Default: 20.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE",
              help="Another field of training or model, as training.lr=0.003; may be given again.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Trainings of every arm.")
@click.option("--central-steps", type=click.Choice(["site", "sum"]), default="site", show_default=True,
              help="Central takes as many steps as each site, or as all of them together.")
@click.option("--leave-one-out", is_flag=True, help="Also a swarm without each site, tested on its cells.")
@click.option("--real", "is_real", is_flag=True,
              help="Agents as processes on a chain of their own; the same bytes, and longer.")
@click.option("--resamples", type=click.IntRange(min=100), default=2000, show_default=True, help="Of the bootstrap.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("benchmark"), show_default=True,
              help="Folder for benchmark.json and benchmark.png.")
@click.option("--json", "as_json", is_flag=True, help="Print benchmark.json, and progress to standard error.")
def benchmark(data: Path, splits: Path, out: Path, as_json: bool, **options: Any) -> None:
    """What sharing the training is worth: swarm, central, every site alone and a linear model on fixed splits.

    Cells are scored by macro-F1, donors by AUROC (two labels) and macro-F1.
    """
    import json

    import torch
    from rich.console import Console

    from swarmchain.benchmark import run_benchmark
    from swarmchain.benchmark_donors import run_donor_benchmark
    from swarmchain.config import write_file
    from swarmchain.scoreboard import format_tables, write_figure

    interrupt_on_signals()
    torch.set_num_threads(1)
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    write_file(out / "benchmark.json", b"{}")  # say so before the work, not after it
    run = run_donor_benchmark if options["task"] == "donor" else run_benchmark
    found = run(_build_settings(data, splits, options), say=lambda words: console.print(words, markup=False))
    write_file(out / "benchmark.json", json.dumps(found, indent=1, sort_keys=True).encode())
    write_figure(out / "benchmark.png", found)
    for table in format_tables(found):
        console.print(table, soft_wrap=False)
    console.print(f"see {out / 'benchmark.json'} and {out / 'benchmark.png'}", markup=False)
    if as_json:
        print_json(found)


def _build_settings(data: Path, splits: Path, options: dict[str, Any]) -> Any:
    from swarmchain.benchmark import Settings, change_law
    from swarmchain.planning import recommend_training
    from swarmchain.spec import Minimums, Model, Normalization, Training, parse_donor_model

    steps = {} if options["steps"] is None else {"training.steps": str(options["steps"])}
    normalization = Normalization(kind=options["normalization"], cofactor=options["cofactor"])
    changes = {**steps, **_read_changes(options["changes"])}
    network, donor = Model(), {}
    if options["task"] == "donor":
        asked, training = change_law(parse_donor_model({"kind": options["kind"]}), Training(steps=10, batch_size=16),
                                     changes)
        donor = {"model": asked, **{key: options[key] for key in ("bag_size", "labels_min")}}
    else:
        network, training = change_law(network, recommend_training(normalization), changes)
    return Settings(
        data=data, splits=splits, task=options["task"], site_column=options["site_column"],
        label_column=options["label_column"], donor_column=options["donor_column"], state=options["state"],
        sample_column=options["sample_column"], normalization=normalization, donor=donor,
        minimums=Minimums(cells_per_label=options["cells_per_label"]), pools_folds=options["pools_folds"],
        sites_per_feature_min=options["features_at"], rounds=options["rounds"], model=network, training=training,
        seeds=options["seeds"], central_steps=options["central_steps"], is_real=options["is_real"],
        leaves_one_out=options["leave_one_out"], resamples=options["resamples"])


def _read_changes(words: tuple[str, ...]) -> dict[str, str]:
    wrong = [word for word in words if "=" not in word]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is not KEY=VALUE", param_hint="--set")
    return dict(word.split("=", 1) for word in words)
