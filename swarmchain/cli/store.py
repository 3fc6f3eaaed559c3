"""`swarmchain store`."""

from __future__ import annotations

from pathlib import Path

import click

from swarmchain.cli.common import connect, example, json_option, load, print_json, site_option
from swarmchain.errors import ConfigError


@click.group()
def store() -> None:
    """Look after the shared store."""


@store.command(epilog=example("swarmchain store prune --site north/site.toml --keep-rounds 20 --dry-run"))
@site_option
@click.option("--keep-rounds", type=click.IntRange(min=1),
              help="Rounds of each run that stay. Default: [store] keep_rounds in site.toml.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
def prune(site_file: Path, keep_rounds: int | None, dry_run: bool, as_json: bool) -> None:
    """Remove contributions, openings and checkpoints of old rounds.

    Specs, seed checkpoints, statistics, the newest and the best checkpoint of every run, all certificates, and
    everything of the rounds that are kept stay. Older rounds can no longer be recomputed: verify them first.
    """
    from swarmchain.retention import plan_pruning
    from swarmchain.retention import prune as carry_out
    from swarmchain.store import open_store

    config = load(site_file)
    keep = keep_rounds or config.store.keep_rounds
    if keep is None:
        raise ConfigError("how many rounds are to stay?", hint="set [store] keep_rounds in site.toml, or --keep-rounds")
    contract, shared = connect(config), open_store(config)
    plans = plan_pruning(contract, shared, keep_rounds=keep)
    if not dry_run:
        carry_out(contract, shared, plans)
    rows = [{"run": plan.run, "before_round": plan.before_round, "objects": len(plan.doomed),
             "bytes": plan.bytes_freed} for plan in plans]
    if as_json:
        print_json({"dry_run": dry_run, "keep_rounds": keep, "runs": rows})
        return
    verb = "would go" if dry_run else "gone"
    for row in rows:
        click.echo(f"run {row['run']}: {row['objects']} objects of rounds before {row['before_round']} {verb}, "
                   f"{row['bytes'] / 1e6:.1f} MB")
