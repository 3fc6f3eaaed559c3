"""`swarmchain status`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swarmchain.cli.common import connect, example, json_option, load, print_json, site_option


@click.command(epilog=example("swarmchain status --site north/site.toml"))
@site_option
@json_option
def status(site_file: Path, as_json: bool) -> None:
    """What the chain says of the consortium: sites, and each run's round, phase, commitments and votes.

    Says too where this site's training takes longer than a round waits.
    """
    from swarmchain.journal import read_paces

    config = load(site_file)
    contract = connect(config)
    paces = read_paces(config.work_dir)
    sites = contract.get_sites()
    names = {record.site: record.name for record in sites}
    runs: list[dict[str, Any]] = []
    for number in range(1, contract.get_run_count() + 1):
        view = contract.view_run(number)
        runs.append({
            "run": number, "round": view.round_id, "phase": view.phase.name, "outcome": view.outcome.name,
            "seconds_left": _seconds_left(view), "failures_in_a_row": view.failures_in_a_row,
            **{key: [names[i] for i in sorted(getattr(view, key))] for key in ("joined", "committed", "voted")},
            "finalized_round": view.finalized_round, "checkpoint": view.checkpoint if view.finalized_round else None,
            "head": view.head, "training": None,
        })
        if pace := paces.get(number):
            runs[-1]["training"] = {"needs_s": pace.train_s, "window_s": pace.window_s, "is_too_slow": pace.is_too_slow}
    found = {"chain_id": contract.chain_id, "contract": contract.address, "client": contract.node.client_version,
             "sites": [{"site": s.site, "name": s.name, "address": s.address} for s in sites], "runs": runs}
    if as_json:
        print_json(found)
        return
    click.echo(f"contract {contract.address} on chain {contract.chain_id} ({found['client']}), {len(sites)} sites")
    for row in runs:
        left = f", {row['seconds_left']} s left" if row["seconds_left"] else ""
        click.echo(f"run {row['run']}: round {row['round']} {row['phase']}{left}; {len(row['joined'])} joined, "
                   f"{len(row['committed'])} committed, {len(row['voted'])} voted; "
                   f"checkpoint {(row['checkpoint'] or 'none yet')[:12]}")
        if row["training"] and row["training"]["is_too_slow"]:
            click.echo(f"  {config.name} cannot make the window: training takes {row['training']['needs_s']:.0f} s, "
                       f"a round waits {row['training']['window_s']:.0f} s; others do not wait for it")


def _seconds_left(view: Any) -> int:
    deadline = {"COMMIT": view.commit_deadline, "VOTE": view.vote_deadline}.get(view.phase.name, view.now)
    return max(0, int(deadline - view.now))
