"""`swarmchain run`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from swarmchain.cli.common import (
    ask_password,
    connect,
    example,
    json_option,
    load,
    open_sealed,
    print_json,
    site_option,
    unlock,
    unlock_keystore,
    unlock_seal_key,
)
from swarmchain.cli.disclose import auditor_key, disclose
from swarmchain.cli.verify import verify
from swarmchain.config import read_site_card, write_file
from swarmchain.errors import ConfigError, SpecError
from swarmchain.protocol import Terms

# what the spec offers, without its libraries: help must come at once
MERGES = ("clipped_mean", "mean", "coordinate_median", "trimmed_mean", "geometric_median", "multi_krum",
          "centered_clipping")
CODECS = ("float32", "float16", "int8")
OUTERS = ("none", "momentum", "nesterov", "fedadam")


def merge_options(command: Callable[..., None]) -> Callable[..., None]:
    """How contributions travel and become a checkpoint; the finer settings stand in the spec that is written."""
    for name, choices, words in (("--outer", OUTERS, "Outer optimiser on the merged delta."),
                                 ("--codec", CODECS, "How contributions are coded."),
                                 ("--merge", MERGES, "Merge method; docs/merge.md tells what each is for.")):
        default, kind = choices[0], click.Choice(choices)
        into = ["method"] if name == "--merge" else []
        command = click.option(name, *into, type=kind, default=default, show_default=True, help=words)(command)
    return command


@click.group()
def run() -> None:
    """Plan, propose, join, list, export and verify runs."""


for command in (verify, disclose, auditor_key):
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
@click.option("--statistics", "source", type=click.IntRange(min=1), required=True, help="A finished statistics run.")
@click.option("--name", default="cell types", show_default=True, help="What the sites call it.")
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True, help="Rounds to train.")
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Minibatches per round.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=1e-3, show_default=True,
              help="Learning rate in the first round.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all randomness in training.")
@click.option("--features-at", type=click.IntRange(min=1), default=2, show_default=True,
              help="Panel: features that at least so many sites have.")
@merge_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The spec to write.")
def cell_type(site_file: Path, source: int, name: str, rounds: int, steps: int, lr: float, seed: int, features_at: int,
              out: Path, **merging: Any) -> None:
    """A run that trains a cell-type classifier on what a statistics run found."""
    from swarmchain.merging import parse_merge
    from swarmchain.planning import plan_cell_type, read_statistics
    from swarmchain.spec import Limits, Training, encode_spec

    config = load(site_file)
    contract = connect(config)
    # every site must be able to read both before it joins
    store = open_sealed(config, contract, None, unlock_seal_key(config))
    view = contract.view_run(source)
    spec, blob = plan_cell_type(
        read_statistics(store, view), view, name=name, sites_per_feature_min=features_at,
        limits=Limits(rounds=rounds, sites_to_start=len(view.joined)),
        training=Training(seed=seed, steps=steps, lr=lr), codec=merging["codec"],
        merge=parse_merge({"method": merging["method"], "outer": {"kind": merging["outer"]}}),
    )
    store.put_blob(blob)
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


@run.command(epilog=example("swarmchain run propose --site north/site.toml --spec training.json"))
@site_option
@click.option("--spec", "spec_file", type=click.Path(path_type=Path), required=True,
              help="Spec, as `run new` wrote it.")
@click.option("--commit-window", type=click.IntRange(min=1), default=3600, show_default=True,
              help="Seconds that a round waits for contributions.")
@click.option("--vote-window", type=click.IntRange(min=1), default=1800, show_default=True,
              help="Seconds that a round waits for votes.")
@click.option("--sites-min", type=click.IntRange(min=1), default=2, show_default=True,
              help="Contributions that a round needs.")
@click.option("--quorum", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="Share of the members that must accept a checkpoint; a majority in any case.")
@json_option
def propose(site_file: Path, spec_file: Path, commit_window: int, vote_window: int, sites_min: int, quorum: float,
            as_json: bool) -> None:
    """Put a spec into the store and its digest on chain. It binds nobody until they join, the proposer included."""
    from swarmchain.site import open_site
    from swarmchain.spec import encode_spec, parse_spec
    from swarmchain.store import open_store

    config = load(site_file)
    try:
        spec = parse_spec(spec_file.read_bytes())
    except OSError as exc:
        raise ConfigError(f"cannot read {spec_file}: {exc.strerror}", hint="`swarmchain run new` writes one") from exc
    terms = Terms(commit_window, vote_window, sites_min, round(quorum * 10_000))
    with open_site(config, unlock(config)) as site:
        digest = open_store(config).put_blob(encode_spec(spec))
        number = site.contract.propose_run(site.signer, spec=digest, terms=terms)
    if as_json:
        print_json({"run": number, "spec": digest})
    else:
        click.echo(f"run {number} proposed: {spec.task} “{spec.name}”, spec {digest[:12]}…")


@run.command(epilog=example("swarmchain run join 1 --site north/site.toml"))
@click.argument("number", type=click.IntRange(min=1))
@site_option
def join(number: int, site_file: Path) -> None:
    """Give this site's consent to a run, after checking that its data satisfy the spec."""
    from swarmchain.keys import find_password
    from swarmchain.site import open_site, publish_seal_key
    from swarmchain.work import check_run

    config = load(site_file)
    path = config.resolve(config.keys.keystore)
    password = ask_password(path, find_password(config))
    seal_key = unlock_seal_key(config, password)
    with open_site(config, unlock_keystore(path, password)) as site:
        contract = site.contract
        if seal_key is not None:
            publish_seal_key(site, seal_key)  # first: what is sealed to this site is sealed to this key
        view = contract.view_run(number)
        store = open_sealed(config, contract, number, seal_key)
        spec = check_run(config, store, view, site=site.index, view_run=contract.view_run)
        contract.join_run(site.signer, number)
    click.echo(f"{config.name} joined run {number}: {spec.task} “{spec.name}”")


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
    from swarmchain.store import read_spec

    config = load(site_file)
    contract = connect(config)
    view = contract.view_run(number)
    if not view.finalized_round:
        raise SpecError(f"run {number} has no checkpoint yet", hint="`swarmchain status` shows how far it is")
    store = open_sealed(config, contract, number, unlock_seal_key(config))
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
