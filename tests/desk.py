"""An operator's desk for tests: a swarm in this process, its commands as they are typed, its agents as threads."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import write_cells

from swarmchain.agent import Agent
from swarmchain.cli import main
from swarmchain.config import read_site_config
from swarmchain.consortium import Consortium, LocalSite, start_consortium
from swarmchain.health import Monitor
from swarmchain.planning import plan_cell_type, plan_statistics, read_statistics
from swarmchain.protocol import Terms
from swarmchain.site import open_site
from swarmchain.spec import (
    CellTypeSpec,
    Limits,
    Panel,
    RehearsalSpec,
    StatisticsRef,
    StatisticsSpec,
    Training,
    encode_spec,
)
from swarmchain.store import Store

# everything that any command of this file printed; a test at its end searches it
SAID: list[str] = []

STATISTICS = StatisticsSpec(name="sums", panel=Panel(features=tuple(f"gene{i}" for i in range(12))),
                            labels=("type 0", "type 1", "type 2"), limits=Limits(rounds=2, sites_to_start=3,
                                                                                 one_checkpoint=True))
REHEARSAL = RehearsalSpec(name="try", widths=(20, 5), limits=Limits(rounds=2, sites_to_start=3))
TRAINING = CellTypeSpec(name="types", panel=STATISTICS.panel, labels=STATISTICS.labels,
                        limits=Limits(rounds=3, sites_to_start=3), seed_checkpoint="ab" * 32,
                        statistics=StatisticsRef(run=1, spec="cd" * 32, checkpoint="ef" * 32))


def swarmchain(*words: object, folder: Path, code: int = 0) -> str:
    """One command, without a terminal; standard output and error together."""
    said, handlers = io.StringIO(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said),
          pytest.raises(SystemExit) as end):
        main([str(word) for word in words])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    SAID.append(said.getvalue())
    assert end.value.code == code, said.getvalue()
    return said.getvalue()


def read_json(*words: object, folder: Path, code: int = 0) -> Any:
    return json.loads(swarmchain(*words, "--json", folder=folder, code=code))


def work(swarm: Consortium, run: int, events: list[dict[str, Any]] | None = None, *, monitor: Monitor | None = None,
         sites: Sequence[LocalSite] = ()) -> None:
    """Agents (by default all) at work on one run until it is over, as threads: their libraries are loaded already."""
    def one(site: LocalSite) -> None:
        config = read_site_config(site.toml)
        seen = monitor if site is swarm.sites[0] and monitor is not None else Monitor()

        def log(event: dict[str, Any]) -> None:
            seen.take(event)
            if events is not None:
                events.append(event)

        def turn() -> bool:
            seen.turn(head=agent.head, views=agent.get_views(), sent={"up": store.bytes_up, "down": store.bytes_down})
            return False

        with open_site(config, site.signer) as opened:
            store = Store(config.store_url)
            agent = Agent(opened, store, log=log, on_duty=seen.begin)
            agent.run([run], stopping=turn)

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, sites or swarm.sites))


@contextlib.contextmanager
def start_swarm(folder: Path) -> Iterator[Consortium]:
    """Three sites with a chain of their own, whose clock no other test moves; each site's card beside its settings."""
    files = {name: write_cells(folder / f"{name}.h5ad", seed=i) for i, name in enumerate(("North", "East", "South"))}
    with start_consortium(folder / "swarm", files, seed=5, label_column="cell_type") as made:
        for site in made.sites:
            (site.folder / "site-card.json").write_text(site.card.model_dump_json())
        yield made


def train(swarm: Consortium) -> tuple[int, int]:
    """A statistics run that is done, and a training run on it that is proposed."""
    summed = swarm.propose(plan_statistics([s.card for s in swarm.sites], name="sums", sites_to_start=3))
    work(swarm, summed)
    view = swarm.contract.view_run(summed)
    spec, seed = plan_cell_type(
        read_statistics(swarm.store, view), view, name="types", limits=Limits(rounds=2, sites_to_start=3),
        training=Training(steps=8, batch_size=16), sites_per_feature_min=2)
    swarm.store.put_blob(seed)
    digest = swarm.store.put_blob(encode_spec(spec))
    return summed, swarm.contract.propose_run(swarm.sites[0].signer, spec=digest, terms=Terms(600, 600, 2))


def write_spec(path: Path, spec: Any) -> Path:
    path.write_bytes(encode_spec(spec))
    return path
