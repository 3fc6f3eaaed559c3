"""`swarmchain agent`."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import click

from swarmchain.cli.common import example, json_option, load, open_desk, site_option, stop_on_signals
from swarmchain.cli.consent import give_consent, yes_option
from swarmchain.config import require_paths
from swarmchain.keys import lock_keystore


@click.command(epilog=example("swarmchain agent --site north/site.toml --run 1"))
@site_option
@click.option("--run", "runs", type=click.IntRange(min=1), multiple=True,
              help="Work on this run and end with it; repeatable. Default: every run the site joined, for good.")
@click.option("--join", "joins", type=click.IntRange(min=1), multiple=True,
              help="First give this site's consent to this run, as `run join` does; repeatable.")
@yes_option
@click.option("--metrics", envvar="SWARMCHAIN_METRICS",
              help="host:port for /healthz and Prometheus' /metrics. Default: [agent] metrics; off without it.")
@json_option
def agent(site_file: Path, runs: tuple[int, ...], joins: tuple[int, ...], is_agreed: bool, metrics: str | None,
          as_json: bool) -> None:
    """Do one site's duties: train, commit, merge, vote. Safe to kill and to start again at any moment."""
    stopping = stop_on_signals()
    config = load(site_file)
    require_paths(config)
    path = config.resolve(config.keys.keystore)

    from swarmchain.agent import Agent

    monitor, address = None, metrics or config.agent.metrics
    if address:
        from swarmchain.health import Monitor

        monitor = Monitor()

    def log(event: dict[str, Any]) -> None:
        if monitor is not None:
            monitor.take(event)
        click.echo(json.dumps({"time": round(time.time(), 3), **event}) if as_json else describe_event(event))

    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_keystore(path))
        desk = stack.enter_context(open_desk(config))
        site, store = desk.site, desk.store
        store.require_writable()
        desk.publish_seal_key()
        for number in joins:
            give_consent(desk, number, is_agreed=is_agreed, is_quiet=as_json)
        worker = Agent(site, store, log=log, seal_key=desk.seal_key,
                       on_duty=monitor.begin if monitor else lambda duty, allowed_s: None)
        if monitor is not None and address:
            from swarmchain.health import serve

            host, port = stack.enter_context(serve(monitor, address))
            log({"event": "listening", "host": host, "port": port})
        log({"event": "started", "site": site.index, "name": config.name, "address": site.signer.address,
             "client": site.contract.node.client_version, "profile": site.contract.node.profile.name})

        def stopping_now() -> bool:
            if monitor is not None:
                monitor.turn(head=worker.head, views=worker.get_views(),
                             sent={"up": store.bytes_up, "down": store.bytes_down})
            return stopping()

        worker.run(runs, stopping=stopping_now)


WORDS = {
    "listening": "health and metrics at http://{host}:{port}/healthz and /metrics",
    "started": "{name}: site {site}, {address}, at work; {client}, profile {profile}",
    "run": "takes part: {told}",
    "opened": "opened",
    "announced": "announced: wait for this site in the next round",
    "trained": "trained on {samples} cells{told}",
    "committed": "committed to its contribution",
    "too slow": "TOO SLOW: training takes {needs_s:.0f} s, a round waits {window_s:.0f} s",
    "published": "disclosed its contribution",
    "lost": "cannot disclose its contribution: {reason}",
    "voted": "{verb} checkpoint {checkpoint:.12}…{told}",
    "verified": "recomputed checkpoint {checkpoint:.12}…, the same as on chain",
    "MISMATCH": "MISMATCH: recomputed {checkpoint}, on chain is {on_chain}",
    "unverifiable": "cannot recompute checkpoint {on_chain:.12}…: the store lacks contributions of sites {missing}",
    "too few": "cannot vote: {openings} contributions are of use, {needed} are needed",
    "refused": "looks again: {reason}",
    "unreachable": "waits: {reason}",
    "stalled": "the chain stands still: {reason} ({node})",
    "cannot": "cannot take part: {reason}",
    "ended": "ended: {reason}; {told}; this site holds checkpoint {checkpoint}",
}


def describe_event(event: dict[str, Any]) -> str:
    """One event as a line for a person."""
    kind = event["event"]
    where = f"run {event['run']}  " if "run" in event else ""
    if "round" in event and kind != "ended":
        where = where.rstrip() + f" round {event['round']:>3}  "
    verb = "accepts" if event.get("accept") else "REJECTS"
    return where + WORDS[kind].format(**{**event, "told": _describe_details(event), "verb": verb})


def _describe_details(event: dict[str, Any]) -> str:
    if event["event"] == "run":
        known = {"cells_train": "training cells", "cells_validation": "validation cells",
                 "cells_excluded": "cells left out", "features": "features",
                 "parameters": "parameters"}
        return ", ".join(f"{event[key]} {words}" for key, words in known.items() if key in event)
    if event["event"] == "ended":
        parts = ["rounds: " + ", ".join(f"{n} {outcome}" for outcome, n in event["rounds"].items())]
        parts += [f"{name} left out of {n} of them ({reason})" for name, reasons in event["left_out"].items()
                  for reason, n in reasons.items()]
        return "; ".join(parts)
    if event["event"] == "trained":
        return "".join(f", {name} {value:.3f}" for name, value in event["metrics"].items())
    score = event.get("score")
    return "" if score is None else f", validation macro-F1 {score:.3f}"
