"""`swarmchain run watch`."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmchain.cli.common import connect, example, json_option, load, site_option, stop_on_signals
from swarmchain.errors import SwarmError, Unreachable

if TYPE_CHECKING:
    from rich.table import Table

    from swarmchain.watching import RunWatch, Snapshot

LOOK_S = 0.5


@click.command(epilog=example("swarmchain run watch 2 --site north/site.toml"))
@click.argument("number", type=click.IntRange(min=1))
@site_option
@click.option("--once", "is_once", is_flag=True, help="Look once and leave.")
@json_option
def watch(number: int, site_file: Path, is_once: bool, as_json: bool) -> None:
    """Watch a run live: phase, time left, who is missing, scores, gas, and when it may be done. Needs no key.

    Without a terminal one line, and with --json one object, for each change. Ends with the run.
    """
    from swarmchain.store import Store, open_store
    from swarmchain.watching import RunWatch, describe_snapshot

    stopping = stop_on_signals()
    config = load(site_file)
    store: Store | None = None
    with contextlib.suppress(SwarmError):
        store = open_store(config)  # without it the chain tells all but the number of rounds
    watched = RunWatch(connect(config), store, number)
    if sys.stdout.isatty() and not as_json and not is_once:
        _show_live(watched, stopping)
        return
    last: tuple[object, ...] = ()
    for seen in _look(watched, stopping):
        if seen.state != last:
            click.echo(json.dumps(asdict(seen), sort_keys=True) if as_json else describe_snapshot(seen))
            last = seen.state
        if is_once:
            return


def _look(watched: RunWatch, stopping: Callable[[], bool]) -> Iterator[Snapshot]:
    """A look every now and then, until the run is over; a chain that does not answer is waited for after the first."""
    seen = None
    while not stopping():
        try:
            seen = watched.look()
            yield seen
        except Unreachable as exc:
            if seen is None:
                raise
            click.echo(f"waits: {exc.message}", err=True)
            time.sleep(10 * LOOK_S)
        if seen is not None and seen.is_over:
            return
        time.sleep(LOOK_S)


def _show_live(watched: RunWatch, stopping: Callable[[], bool]) -> None:
    from rich.live import Live

    with Live(auto_refresh=False) as live:
        for seen in _look(watched, stopping):
            live.update(_draw(seen), refresh=True)


def _draw(seen: Snapshot) -> Table:
    from rich.table import Table

    from swarmchain.describe import describe_duration
    from swarmchain.watching import describe_snapshot

    table = Table(title=f"run {seen.run} {seen.task} “{seen.name}”", caption=describe_snapshot(seen))
    for heading in ("site", "committed", "voted", "score"):
        table.add_column(heading)
    for name in seen.joined:
        late = "waited for" if name in seen.missing else ""
        table.add_row(name, "✓" if name in seen.committed else late if seen.phase == "COMMIT" else "",
                      "✓" if name in seen.voted else late if seen.phase == "VOTE" else "",
                      f"{seen.scores[name]:.3f}" if name in seen.scores else "")
    if seen.seconds_left is not None:
        table.add_section()
        table.add_row(f"{seen.phase.lower()}: {describe_duration(seen.seconds_left)} left")
    return table
