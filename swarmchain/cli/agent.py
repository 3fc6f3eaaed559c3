"""`swarmchain agent`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from swarmchain.cli.common import connect, example, json_option, load, site_option, stop_on_signals, unlock


@click.command(epilog=example("swarmchain agent --site north/site.toml --run 1"))
@site_option
@click.option("--run", "runs", type=click.IntRange(min=1), multiple=True,
              help="Work on this run and end with it; repeatable. Default: every run the site joined, for good.")
@json_option
def agent(site_file: Path, runs: tuple[int, ...], as_json: bool) -> None:
    """Do one site's duties: train, commit, merge, vote. Safe to stop and to start again at any time."""
    stopping = stop_on_signals()
    config = load(site_file)
    signer = unlock(config)
    contract = connect(config)

    from swarmchain.agent import Agent

    def log(event: dict[str, Any]) -> None:
        click.echo(json.dumps({"time": round(time.time(), 3), **event}) if as_json else _in_words(event))

    worker = Agent(config, signer, contract, log=log)
    log({"event": "started", "site": worker.site, "name": config.name, "address": signer.address})
    try:
        worker.run(runs, stopping=stopping)
    finally:
        worker.close()


WORDS = {
    "started": "{name}: site {site}, {address}, at work",
    "run": "{cells_train} training and {cells_validation} validation cells, {features} features of the panel",
    "opened": "opened",
    "committed": "committed a contribution from {samples} cells",
    "voted": "{verb} checkpoint {checkpoint:.12}…{told}",
    "verified": "recomputed checkpoint {checkpoint:.12}…, the same as on chain",
    "MISMATCH": "MISMATCH: recomputed {checkpoint}, on chain is {on_chain}",
    "unverifiable": "cannot recompute checkpoint {on_chain:.12}…: the store lacks contributions of sites {missing}",
    "too few": "cannot vote: of {openings} openings fewer than {needed} are of use",
    "refused": "looks again: {reason}",
    "unreachable": "waits: {reason}",
    "ended": "ended: {reason}; this site holds checkpoint {checkpoint}",
}


def _in_words(event: dict[str, Any]) -> str:
    where = f"run {event['run']}  " if "run" in event else ""
    if "round" in event and event["event"] != "ended":
        where = where.rstrip() + f" round {event['round']:>3}  "
    score = event.get("score")
    told = "" if score is None else f", validation macro-F1 {score:.3f}"
    verb = "accepts" if event.get("accept") else "REJECTS"
    return where + WORDS[event["event"]].format(**{**event, "told": told, "verb": verb})
