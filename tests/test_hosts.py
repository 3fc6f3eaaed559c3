"""Hospitals on hosts of their own: addresses, users, keys, data and agents apart; the chain and the store have theirs.

One link is cut for longer than a round waits, and another is slowed: nothing is lost but what the silent site did not
send in time, and all end with the same bytes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_cells
from lab import Host, Lab, find_obstacle, start_lab

from swarmchain.devchain import find_anvil

OBSTACLE = find_obstacle()
SITES = ("north", "east", "south")
ROUNDS = 6
COMMIT_S, VOTE_S = 12, 60
SWARMCHAIN = (sys.executable, "-m", "swarmchain")
PASSWORD = {"SWARMCHAIN_PASSWORD": "correct horse"}


def write_identities(path: Path) -> dict[str, dict[str, str]]:
    """Access keys as SeaweedFS wants them, one pair for each site; what brings a site's pair to its programs."""
    pairs = {name: {"accessKey": f"ACCESS{name.upper()}", "secretKey": f"secret of {name}"} for name in SITES}
    actions = [f"{right}:swarm" for right in ("Read", "Write", "List")]
    identities = [{"name": name, "credentials": [pair], "actions": actions} for name, pair in pairs.items()]
    admin = {"accessKey": "ADMIN", "secretKey": "secret of nobody here"}
    path.write_text(json.dumps({"identities": [
        *identities, {"name": "admin", "credentials": [admin], "actions": ["Admin", "Read", "Write", "List"]}]}))
    return {name: {"AWS_ACCESS_KEY_ID": pair["accessKey"], "AWS_SECRET_ACCESS_KEY": pair["secretKey"]}
            for name, pair in {**pairs, "admin": admin}.items()}


def wait(what: str, is_so: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.2)


def answers(host: Host, url: str) -> bool:
    script = f"import urllib.request, urllib.error\ntry: urllib.request.urlopen({url!r}, timeout=2)\n" \
             "except urllib.error.HTTPError: pass"
    return host.ask(sys.executable, "-c", script)[0] == 0


class Consortium:
    """Three hospitals that have set themselves up, from the words that a user types."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.sites = lab, [lab.hosts[name] for name in SITES]
        chain, store = lab.hosts["chain"], lab.hosts["store"]
        self.rpc_url = f"http://{chain.address}:8545"
        endpoint = f"http://{store.address}:8333"
        keys = write_identities(folder / "identities.json")
        identities = store.receive(folder / "identities.json", "identities.json")
        weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or "weed"
        store.start(weed, "server", "-s3", f"-s3.config={identities}", f"-dir={store.home}", f"-ip={store.address}",
                    "-volume.max=5", "-master.volumeSizeLimitMB=64", log="weed.log")
        chain.start(find_anvil(), "--host", chain.address, "--port", "8545", "--gas-price", "0",
                    "--block-base-fee-per-gas", "0", log="anvil.log")
        self.env = {name: {**PASSWORD, **pair, "AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1"}
                    for name, pair in keys.items()}
        wait("the store answers", lambda: answers(store, endpoint))
        wait("the chain answers", lambda: answers(chain, self.rpc_url))
        make = "import s3fs; s3fs.S3FileSystem().mkdir('swarm')"
        wait("the bucket", lambda: store.ask(sys.executable, "-c", make, env=self.env["admin"])[0] == 0)
        for i, host in enumerate(self.sites):
            host.receive(write_cells(folder / f"{host.name}.h5ad", seed=i, cells=240), "cells.h5ad")
            self.say(host, "site", "init", "--name", host.name, "--data", "cells.h5ad", "--label-column", "cell_type",
                     "--store", "s3://swarm/consortium", "--rpc-url", self.rpc_url, "--deployment", "deployment.json")

    def say(self, host: Host, *words: object) -> str:
        return host.call(*SWARMCHAIN, *words, env=self.env[host.name])

    def found(self) -> None:
        """One site deploys with the cards that the others handed over; they get the deployment from it."""
        first = self.sites[0]
        cards = [part for host in self.sites
                 for part in ("--site", first.receive(host.home / "site-card.json", f"cards/{host.name}.json"))]
        self.say(first, "deploy", "--rpc-url", self.rpc_url, "--keystore", "keystore.json", *cards, "--out",
                 "deployment.json")
        for host in self.sites[1:]:
            host.receive(first.home / "deployment.json", "deployment.json")

    def start_run(self, *new: object, terms: tuple[object, ...] = ()) -> int:
        first = self.sites[0]
        self.say(first, "run", "new", *new, "--out", "spec.json")
        said = self.say(first, "run", "propose", "--spec", "spec.json", "--json", *terms)
        run: int = json.loads(said)["run"]
        for host in self.sites:
            self.say(host, "run", "join", run)
        return run

    def start_agents(self, run: int) -> dict[str, subprocess.Popen[str]]:
        return {host.name: host.start(*SWARMCHAIN, "agent", "--json", "--run", run, env=self.env[host.name],
                                      log=f"agent-{run}.jsonl") for host in self.sites}

    def read_events(self, host: Host, run: int) -> list[dict[str, Any]]:
        lines = (host.home / f"agent-{run}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def finish(self, agents: dict[str, subprocess.Popen[str]], run: int) -> dict[str, dict[str, Any]]:
        ended = {}
        for host in self.sites:
            code = agents[host.name].wait(timeout=120)
            text = (host.home / f"agent-{run}.jsonl").read_text()
            assert code == 0, text[-2000:]
            ended[host.name] = next(e for e in self.read_events(host, run) if e["event"] == "ended")
        return ended


@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(OBSTACLE), reason=f"hosts cannot be made here: {OBSTACLE}")
def test_three_hospitals_with_a_cut_and_a_slow_link(tmp_path: Path) -> None:
    with start_lab([*SITES, "chain", "store"]) as lab:
        swarm = Consortium(lab, tmp_path)
        swarm.found()
        north, east, south = swarm.sites
        # a site sees neither the others' cells nor their keys
        for secret in ("cells.h5ad", "keystore.json", "site.toml"):
            assert "Permission denied" in north.call("cat", east.home / secret, code=1)
        cards = [part for host in swarm.sites
                 for part in ("--card", north.receive(host.home / "site-card.json", f"cards/{host.name}.json"))]
        first = swarm.start_run("statistics", *cards)
        swarm.finish(swarm.start_agents(first), first)

        second = swarm.start_run("cell-type", "--statistics", first, "--rounds", ROUNDS, "--steps", 5,
                                 terms=("--commit-window", COMMIT_S, "--vote-window", VOTE_S, "--sites-min", 2))
        lab.slow(east, rate="400kbit")
        agents = swarm.start_agents(second)
        wait("south has voted once", lambda: any(e["event"] == "voted" for e in swarm.read_events(south, second)))
        lab.cut(south)
        cut_at = len(swarm.read_events(north, second))
        wait("the others finalize a round without it", lambda: sum(
            e["event"] == "voted" for e in swarm.read_events(north, second)[cut_at:]) >= 2)
        lab.restore(south)
        ended = swarm.finish(agents, second)
        assert len({event["checkpoint"] for event in ended.values()}) == 1
        assert ended["north"]["rounds"] == {"finalized": ROUNDS, "rejected": 0, "expired": 0}
        assert set(ended["north"]["left_out"]) == {"south"}
        last = [e for e in swarm.read_events(south, second) if e["event"] == "committed"][-1]
        assert last["round"] == ROUNDS  # it was back in time
        assert any(e["event"] == "unreachable" for e in swarm.read_events(south, second))
        for host in swarm.sites:
            told = "".join(path.read_text() for path in host.home.glob("*.jsonl"))
            assert PASSWORD["SWARMCHAIN_PASSWORD"] not in told
            assert swarm.env[host.name]["AWS_SECRET_ACCESS_KEY"] not in told
