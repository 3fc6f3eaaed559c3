"""`swarmchain demo`."""

from __future__ import annotations

from pathlib import Path

import click

from swarmchain.cli.common import example, interrupt_on_signals, print_json


@click.command(epilog=example("swarmchain demo --out demo-report"))
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="A folder with one .h5ad per site. Default: PBMCs inside scanpy, dealt to four hospitals.")
@click.option("--splits", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="A table with the columns site, cell, split (train or test).")
@click.option("--label-column", default="cell_type", show_default=True, help="Of .obs, with --data.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-report"), show_default=True,
              help="Folder for the report, the summary and the model.")
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds to train. Default: 15, with --data 50.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Same seed, same model.")
@click.option("--json", "as_json", is_flag=True, help="Print summary.json when done, and progress to standard error.")
def demo(data: Path | None, splits: Path | None, label_column: str, out: Path, rounds: int | None, seed: int,
         as_json: bool) -> None:
    """A whole consortium on this machine: own chain, own store, one process per hospital, real cells."""
    from rich.console import Console

    from swarmchain.demo import run_demo

    interrupt_on_signals()
    summary = run_demo(data=data, splits=splits, label_column=label_column, out=out, rounds=rounds, seed=seed,
                       console=Console(stderr=as_json, highlight=False, soft_wrap=True))
    if as_json:
        print_json(summary)
