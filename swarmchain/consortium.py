"""A whole swarm on this machine: chain, contract, shared folder, and one operating-system process for each site.

The sites' keys are drawn from the seed, so that a run repeats to the last bit; real sites make theirs with `site init`.
Every process that is started here is ended here, whatever happens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarmchain.chain import SwarmContract, deploy_contract
from swarmchain.config import Deployment, SiteCard, read_site_config, write_file
from swarmchain.devchain import Devchain, start_devchain, stop_process
from swarmchain.errors import SwarmError
from swarmchain.keys import Signer, create_keystore, open_keystore
from swarmchain.node import Node
from swarmchain.protocol import Terms
from swarmchain.site_text import render_site_toml
from swarmchain.spec import Spec, encode_spec
from swarmchain.store import Store

# For throw-away keys of a demonstration: a keystore that opens in milliseconds.
DEMO_WORK_LOG2 = 12
PASSWORD_FILE = "password.txt"  # noqa: S105 - a file's name
AGENT = ("-m", "swarmchain", "agent")
TERMS = Terms(commit_window_s=120, vote_window_s=60, sites_min=2)


@dataclass(frozen=True)
class Polling:
    """How often local agents look, and how long they wait for the one whose turn it is, in seconds."""

    poll_s: float = 0.1
    stagger_s: float = 2.0


@dataclass
class LocalSite:
    """One site of a local consortium: its folder, key, card and process."""

    name: str
    folder: Path
    signer: Signer
    card: SiteCard
    process: subprocess.Popen[str] | None = None
    offset: int = 0

    @property
    def toml(self) -> Path:
        """The site's settings."""
        return self.folder / "site.toml"

    @property
    def errors(self) -> Path:
        """What the agent says when it fails."""
        return self.folder / "agent.err"

    @property
    def log(self) -> Path:
        """The agent's output: one JSON object a line."""
        return self.folder / "agent.jsonl"

    def read_new_events(self) -> list[dict[str, Any]]:
        """Complete lines of the agent's log that were not read before."""
        if not self.log.exists():
            return []
        with self.log.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self.offset += len(data)
        return [json.loads(line) for line in data.splitlines() if line.startswith(b"{")]


@dataclass
class Consortium:
    """Sites that share a contract and a folder."""

    folder: Path
    chain: Devchain
    contract: SwarmContract
    deployment: Deployment
    store: Store
    sites: list[LocalSite] = field(default_factory=list)
    chain_options: Sequence[str] = ()
    chains: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    def propose(self, spec: Spec, *, terms: Terms = TERMS) -> int:
        """The first site proposes, every site joins; returns the run's number."""
        digest = self.store.put_blob(encode_spec(spec))
        run = self.contract.propose_run(self.sites[0].signer, spec=digest, terms=terms)
        for site in self.sites:
            self.contract.join_run(site.signer, run)
        return run

    def start_agents(self, runs: Sequence[int]) -> None:
        """One process for each site, working on `runs`."""
        for site in self.sites:
            self.start_agent(site, runs)

    def start_agent(self, site: LocalSite, runs: Sequence[int], *, program: Sequence[str] = AGENT) -> None:
        """A process for one site; `program` is what it runs, in front of the options of `swarmchain agent`."""
        chosen = [part for run in runs for part in ("--run", str(run))]
        # The user's own site may be named in the environment; these sites have their settings in their files.
        ambient = {key: value for key, value in os.environ.items() if not key.startswith("SWARMCHAIN_")}
        environment = {**ambient, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, *program, "--site", str(site.toml), "--json", *chosen]
        with site.log.open("ab") as output, site.errors.open("ab") as errors:
            site.process = subprocess.Popen(
                command, stdout=output, stderr=errors, stdin=subprocess.DEVNULL, text=True, env=environment,
                start_new_session=True,
            )

    def restart_chain(self, *, number: signal.Signals = signal.SIGKILL, pause_s: float = 0.0) -> None:
        """End the chain with a signal, and start it at the same place; it then knows what its `--state` file holds."""
        os.killpg(self.chain.process.pid, number)
        self.chain.process.wait(timeout=10)
        time.sleep(pause_s)
        port = int(self.chain.rpc_url.rsplit(":", 1)[1])
        self.chain = self.chains.enter_context(start_devchain("anvil", port=port, options=self.chain_options))

    def stop_agents(self) -> None:
        """End every agent that still runs."""
        for site in self.sites:
            if site.process is not None:
                stop_process(site.process)

    def follow(self, show: Callable[[str, dict[str, Any]], None], *, until: Callable[[], bool] | None = None,
               timeout_s: float = 3600.0) -> None:
        """Pass on the agents' events until `until` is true or all have ended.

        Raises
        ------
        SwarmError
            If an agent fails (with its last line), or the time is up.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            running = [s for s in self.sites if s.process is not None and s.process.poll() is None]
            for site in self.sites:
                for event in site.read_new_events():
                    show(site.name, event)
                if site.process is not None and site.process.poll() not in (None, 0):
                    raise SwarmError(f"the agent of {site.name} failed: {_last_line(site.errors)}",
                                     hint=f"its whole output is in {site.folder}")
            if not running or (until is not None and until()):
                return
            if time.monotonic() > deadline:
                raise SwarmError(f"the agents are not done after {timeout_s:.0f} s", hint=f"see {self.folder}")
            time.sleep(0.1)


@contextlib.contextmanager
def start_consortium(
    folder: Path, files: Mapping[str, Path | None], *, seed: int, label_column: str = "",
    label_map: Mapping[str, str] | None = None, state: str = "auto", donor_column: str | None = None,
    sample_column: str | None = None, classes_min: int = 2, polling: Polling = Polling(),
    chain_options: Sequence[str] = (),
) -> Iterator[Consortium]:
    """A chain, a contract and sites, all under `folder`, while the context lasts.

    Parameters
    ----------
    files
        Name → AnnData file of each site; None for a site that has no cells.
    state
        What X of all files holds, see `config.DataConfig`.
    chain_options
        More options for Anvil's command line.
    """
    store_folder = folder / "store"
    store_folder.mkdir(parents=True)
    with contextlib.ExitStack() as chains:
        chain = chains.enter_context(start_devchain("anvil", options=chain_options))
        cells = {"label_column": label_column, "label_map": dict(label_map or {}), "state": state,
                 "donor_column": donor_column, "sample_column": sample_column, "classes_min": classes_min}
        sites = [
            _make_site(folder, name, path, rpc_url=chain.rpc_url, seed=seed, rank=i, cells=cells, polling=polling)
            for i, (name, path) in enumerate(files.items())
        ]
        node = Node(chain.rpc_url)
        deployment = deploy_contract(node, sites[0].signer, [(s.signer.address, s.name) for s in sites])
        write_file(folder / "deployment.json", deployment.model_dump_json(indent=2).encode())
        contract = SwarmContract(node, deployment)
        consortium = Consortium(folder, chain, contract, deployment, Store(str(store_folder)), sites, chain_options,
                                chains)
        try:
            yield consortium
        finally:
            consortium.stop_agents()


def _make_site(folder: Path, name: str, data: Path | None, *, rpc_url: str, seed: int, rank: int,
               cells: dict[str, Any], polling: Polling) -> LocalSite:
    home = folder / name.replace("/", "_")
    home.mkdir(parents=True)
    secret = hashlib.sha256(f"swarmchain demo key {seed} {rank}".encode()).digest()
    password = hashlib.sha256(b"password" + secret).hexdigest()
    write_file(home / PASSWORD_FILE, password.encode() + b"\n", mode=0o600)
    create_keystore(home / "keystore.json", password, secret=secret, work_log2=DEMO_WORK_LOG2)
    text = render_site_toml(
        name=name, rpc_url=rpc_url, deployment="../deployment.json", store="../store",
        data=None if data is None else str(data.resolve()), **cells, password_file=PASSWORD_FILE,
        poll_s=polling.poll_s, stagger_s=polling.stagger_s,
    )
    write_file(home / "site.toml", text.encode())
    read_site_config(home / "site.toml")
    from swarmchain.data import read_names  # takes anndata, which a rehearsal does without

    features, labels = ([], []) if data is None else read_names(data, cells["label_column"])
    renamed = sorted({cells["label_map"].get(label, label) for label in labels} - {""})
    signer = open_keystore(home / "keystore.json", password)
    card = SiteCard(name=name, address=signer.address, features=tuple(features), labels=tuple(renamed))
    return LocalSite(name, home, signer, card)


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.exists() else []
    errors = [line for line in lines if line.startswith("Error: ")]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("Error: ")
