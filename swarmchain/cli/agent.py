"""`swarmchain agent`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from swarmchain.cli.common import connect, json_option, load, site_option, stop_on_signals, unlock


@click.command(epilog="Example:  swarmchain agent --site charite/site.toml --run 1")
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


def _in_words(event: dict[str, Any]) -> str:
    kind = event["event"]
    where = f"run {event['run']}" if "run" in event else ""
    where += f" round {event['round']:>3}" if "round" in event else ""
    if kind == "voted":
        score = "" if event["score"] is None else f", validation macro-F1 {event['score']:.3f}"
        verb = "accepts" if event["accept"] else "REJECTS"
        return f"{where}  {verb} checkpoint {event['checkpoint'][:12]}…{score}"
    details = {k: v for k, v in event.items() if k not in ("event", "run", "round", "gas", "bytes", "spec")}
    text = ", ".join(f"{k} {v[:12] + '…' if isinstance(v, str) and len(v) == 64 else v}" for k, v in details.items())
    return f"{where}  {kind}  {text}".strip()
