"""`swarmchain run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swarmchain.cli.common import connect, example, json_option, load, print_json, site_option
from swarmchain.cli.compare import compare
from swarmchain.cli.consent import join, leave, show, stop
from swarmchain.cli.disclose import auditor_key, disclose
from swarmchain.cli.export import export
from swarmchain.cli.new_donor import donor
from swarmchain.cli.plans import cell_type_options, make_cell_type, make_statistics, merge_options, statistics_options
from swarmchain.cli.propose import propose, start
from swarmchain.cli.statistics import statistics as show_statistics
from swarmchain.cli.verify import verify
from swarmchain.cli.watch import watch
from swarmchain.config import read_site_card, write_file
from swarmchain.errors import ConfigError


@click.group()
def run() -> None:
    """Plan, propose, show, join, watch, leave, list, export, compare and verify runs."""


for command in (verify, export, compare, show_statistics, propose, start, show, join, leave, stop, watch, disclose,
                auditor_key):
    run.add_command(command)


@run.group()
def new() -> None:
    """Write a spec to propose."""


new.add_command(donor)


@new.command(epilog=example(
    "swarmchain run new statistics --card north/site-card.json --card east/site-card.json",
    "--card south/site-card.json --out statistics.json"))
@click.option("--card", "cards", type=click.Path(path_type=Path), multiple=True, required=True,
              help="A site's card; repeatable.")
@statistics_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The spec to write.")
def statistics(cards: tuple[Path, ...], out: Path, **options: Any) -> None:
    """A run that sums moments and counts over the sites: for the choice of features, means, SDs and class balance."""
    from swarmchain.spec import encode_spec

    spec = make_statistics([read_site_card(path) for path in cards], **options)
    write_file(out, encode_spec(spec))
    click.echo(f"wrote {out}: {len(spec.panel.features)} features, {len(spec.labels)} labels")


@new.command("cell-type", epilog=example(
    "swarmchain run new cell-type --site north/site.toml --statistics 1 --rounds 12", "--out training.json"))
@site_option
@cell_type_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The spec to write.")
def cell_type(site_file: Path, out: Path, **options: Any) -> None:
    """A run that trains a cell-type classifier on what a statistics run found."""
    from swarmchain.spec import encode_spec

    spec = make_cell_type(load(site_file), **options)
    write_file(out, encode_spec(spec))
    click.echo(f"wrote {out}: {len(spec.panel.features)} features, {len(spec.labels)} labels; "
               f"seed checkpoint {spec.seed_checkpoint[:12]}… is in the store")


@new.command(epilog=example("swarmchain run new evaluation --site north/site.toml --run 2 --out evaluation.json"))
@site_option
@click.option("--run", "trained", type=click.IntRange(min=1), required=True, help="A finished training run.")
@click.option("--name", default="evaluation", show_default=True, help="What the sites call it.")
@click.option("--sites", type=click.IntRange(1, 256), show_default="all of the training run",
              help="Sites that the first round waits for.")
@click.option("--cells-min", type=click.IntRange(min=1),
              help="Validation cells that a site must have to take part; samples, where the model calls donors.")
@click.option("--donors-min", type=click.IntRange(min=0), help="Donors that these must come from.")
@click.option("--right-share-min", type=click.FloatRange(0, 1),
              help="Share of the calls above the unknown threshold that must be right.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The spec to write.")
def evaluation(site_file: Path, trained: int, name: str, sites: int | None, cells_min: int | None,
               donors_min: int | None, right_share_min: float | None, out: Path) -> None:
    """A run that sums how a finished model does on every site's validation cells."""
    from swarmchain.evaluating import plan_evaluation, read_trained
    from swarmchain.spec import encode_spec
    from swarmchain.store import open_store

    config = load(site_file)
    view = connect(config).view_run(trained)
    spec = plan_evaluation(read_trained(open_store(config), view), view, name=name, sites_to_start=sites or 0,
                           cells_min=cells_min, donors_min=donors_min, right_share_min=right_share_min)
    write_file(out, encode_spec(spec))
    click.echo(f"wrote {out}: {len(spec.labels)} labels, {len(spec.temperatures)} temperatures; a site needs "
               f"{spec.cells_min} validation cells or samples, of {spec.donors_min} donors")


@new.command(epilog=example("swarmchain run new rehearsal --sites 3 --rounds 5 --out rehearsal.json"))
@click.option("--sites", type=click.IntRange(1, 256), required=True, help="Sites that the first round waits for.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds to run.")
@click.option("--width", "widths", type=click.IntRange(min=1), multiple=True, default=(2000, 256, 10),
              show_default=True, help="Width of a layer, from inputs to outputs; repeatable.")
@click.option("--name", default="rehearsal", show_default=True, help="What the sites call it.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random contributions.")
@merge_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The spec to write.")
def rehearsal(sites: int, rounds: int, widths: tuple[int, ...], name: str, seed: int, out: Path, **merging: Any
              ) -> None:
    """A run without cells, to try chain, store and merge with random numbers of a model's size."""
    from swarmchain.merging import parse_merge
    from swarmchain.spec import Limits, RehearsalSpec, encode_spec, parse_spec

    if len(widths) < 2:
        raise ConfigError("a model has at least two widths", hint="--width 2000 --width 10 is the smallest kind")
    spec = RehearsalSpec(name=name, widths=widths, seed=seed, limits=Limits(rounds=rounds, sites_to_start=sites),
                         merge=parse_merge({"method": merging["method"], "outer": {"kind": merging["outer"]},
                                            "trust": None}),
                         codec=merging["codec"])
    data = encode_spec(spec)
    parse_spec(data)
    write_file(out, data)
    click.echo(f"wrote {out}: layers {' × '.join(map(str, widths))}, {rounds} rounds, no cells")


@run.command("list", epilog=example("swarmchain run list --site north/site.toml --json"))
@site_option
@json_option
def list_runs(site_file: Path, as_json: bool) -> None:
    """The consortium's runs."""
    from swarmchain.store import open_store, read_spec

    config = load(site_file)
    contract = connect(config)
    store = open_store(config)
    rows: list[dict[str, Any]] = []
    for number in range(1, contract.get_run_count() + 1):
        view = contract.view_run(number)
        spec = read_spec(store, view.spec)
        rows.append({"run": number, "task": spec.task, "name": spec.name, "spec": view.spec,
                     "joined": sorted(view.joined), "round": view.round_id, "rounds": spec.limits.rounds,
                     "phase": view.phase.name, "checkpoint": view.checkpoint if view.finalized_round else None})
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(f"{row['run']:>3}  {row['task']:<10}  {row['name']:<24}  {len(row['joined'])} joined  "
                   f"round {row['round']}/{row['rounds']} {row['phase']:<7} {(row['checkpoint'] or '-')[:12]}")
