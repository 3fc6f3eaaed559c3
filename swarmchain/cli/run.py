"""`swarmchain run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swarmchain.cli.common import connect, example, json_option, load, print_json, site_option
from swarmchain.cli.consent import join, leave, show, stop
from swarmchain.cli.plans import cell_type_options, make_cell_type, merge_options
from swarmchain.cli.propose import propose, start
from swarmchain.cli.verify import verify
from swarmchain.cli.watch import watch
from swarmchain.config import read_site_card, write_file
from swarmchain.errors import ConfigError, SpecError


@click.group()
def run() -> None:
    """Plan, propose, show, join, watch, leave, list, export and verify runs."""


for command in (verify, propose, start, show, join, leave, stop, watch):
    run.add_command(command)


@run.group()
def new() -> None:
    """Write a spec to propose."""


@new.command(epilog=example(
    "swarmchain run new statistics --card north/site-card.json --card east/site-card.json",
    "--card south/site-card.json --out statistics.json"))
@click.option("--card", "cards", type=click.Path(path_type=Path), multiple=True, required=True,
              help="A site's card; repeatable.")
@click.option("--name", default="statistics", show_default=True, help="What the sites call it.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The spec to write.")
def statistics(cards: tuple[Path, ...], name: str, out: Path) -> None:
    """A run that sums means, SDs and class counts over the sites."""
    from swarmchain.planning import plan_statistics
    from swarmchain.spec import encode_spec

    found = [read_site_card(path) for path in cards]
    spec = plan_statistics(found, name=name, sites_to_start=len(found))
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
                         merge=parse_merge({"method": merging["method"], "outer": {"kind": merging["outer"]}}),
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
    from swarmchain.store import Store, read_spec

    config = load(site_file)
    contract = connect(config)
    store = Store(config.store_url)
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


@run.command(epilog=example("swarmchain run export 2 --site north/site.toml --out model"))
@click.argument("number", type=click.IntRange(min=1))
@site_option
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@json_option
def export(number: int, site_file: Path, out: Path, as_json: bool) -> None:
    """Write a run's final checkpoint, spec and manifest: the model, and the certificate of how it came about."""
    from swarmchain.checkpoint import compute_size
    from swarmchain.layouts import checkpoint_layout
    from swarmchain.protocol import MANIFEST_BYTES_MAX
    from swarmchain.spec import encode_spec
    from swarmchain.store import Store, read_spec

    config = load(site_file)
    view = connect(config).view_run(number)
    if not view.finalized_round:
        raise SpecError(f"run {number} has no checkpoint yet", hint="`swarmchain status` shows how far it is")
    store = Store(config.store_url)
    spec = read_spec(store, view.spec)
    size = compute_size(checkpoint_layout(spec))
    write_file(out / "model.safetensors", store.get_blob(view.checkpoint, bytes_max=size))
    write_file(out / "spec.json", encode_spec(spec))
    write_file(out / "manifest.json", store.get_blob(view.manifest, bytes_max=MANIFEST_BYTES_MAX))
    if as_json:
        print_json({"run": number, "round": view.finalized_round, "checkpoint": view.checkpoint, "out": str(out)})
    else:
        click.echo(f"run {number}, round {view.finalized_round}: checkpoint {view.checkpoint}\n"
                   f"wrote {out}/model.safetensors, spec.json, manifest.json")
