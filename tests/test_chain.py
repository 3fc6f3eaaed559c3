from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
from conftest import ROOT, World, make_signers, make_world

from swarmchain import errors
from swarmchain.chain import SwarmContract
from swarmchain.devchain import Devchain, start_devchain
from swarmchain.errors import CONTRACT_ERRORS, ChainError, ChainUnreachable, DevchainError
from swarmchain.node import Node, load_artifact
from swarmchain.protocol import Opening, Outcome, Phase, Terms, compute_commitment

SPEC, C1, M1 = "ab" * 32, "11" * 32, "22" * 32


def start_run(world: World, *, joined: int = 3, sites_min: int = 2) -> int:
    run = world.contract.propose_run(world.signers[0], spec=SPEC, terms=Terms(100, 50, sites_min))
    for signer in world.signers[:joined]:
        world.contract.join_run(signer, run)
    return run


def test_client_is_anvil(anvil: Devchain) -> None:
    assert Node(anvil.rpc_url).client_version.startswith("anvil/")
    assert anvil.chain_id == 31337


def drive_a_round(world: World) -> None:
    contract, signers = world.contract, world.signers
    run = start_run(world)
    contract.open_round(signers[0], run)
    for signer in signers:
        assert contract.view_run(run).phase is Phase.COMMIT
        contract.commit(signer, run, 1, C1)
    assert contract.view_run(run).phase is Phase.VOTE
    for signer in signers[:2]:
        contract.vote(signer, (run, 1), C1, M1, accept=True, score_bps=9000)
    view = contract.view_run(run)
    assert (view.phase, view.outcome, view.checkpoint, view.manifest) == (Phase.CLOSED, Outcome.FINALIZED, C1, M1)
    assert contract.get_accepting(run, C1, M1) == {0, 1}
    assert [e.name for e in contract.get_events(["Committed", "RoundFinalized"], run=run)] == ["Committed"] * 3 + [
        "RoundFinalized"
    ]


def test_round_on_anvil(world: World) -> None:
    drive_a_round(world)


def test_round_on_hardhat() -> None:
    with start_devchain("hardhat") as chain:
        world = make_world(chain)
        assert world.contract.node.client_version.startswith("HardhatNetwork/")
        drive_a_round(world)
        with pytest.raises(errors.AlreadyJoined, match="site 0 has already joined run 1"):
            world.contract.join_run(world.signers[0], 1)


@pytest.mark.parametrize("engine", ["anvil", "hardhat"])
def test_one_key_used_by_two_processes_at_once(engine: Literal["anvil", "hardhat"]) -> None:
    """As when a person proposes a run while the site's agent works with the same key."""
    with start_devchain(engine) as chain:
        world = make_world(chain)

        def propose(_: int) -> list[int]:
            contract = SwarmContract(Node(chain.rpc_url), world.deployment)
            return [contract.propose_run(world.signers[0], spec=SPEC, terms=Terms(100, 50, 2)) for _ in range(8)]

        with ThreadPoolExecutor(4) as pool:
            runs = [run for found in pool.map(propose, range(4)) for run in found]
        assert sorted(runs) == list(range(1, 33))


def test_commitment_equals_the_contracts(world: World) -> None:
    opening = Opening(digest="cd" * 32, samples=7, nonce="ef" * 32)
    key = world.contract.key_of(3, 9)
    reference = world.contract._call(
        "computeCommitment", 3, 9, 1, bytes.fromhex(opening.digest), 7, bytes.fromhex(opening.salt)
    )
    assert compute_commitment(key, 1, opening) == reference.hex()


def test_round_expires_and_the_next_expects_who_committed(world: World) -> None:
    contract, signers = world.contract, world.signers
    run = start_run(world)
    contract.open_round(signers[0], run)
    contract.commit(signers[0], run, 1, C1)
    world.pass_time(101)
    view = contract.view_run(run)
    assert (view.phase, view.outcome, view.failures_in_a_row) == (Phase.CLOSED, Outcome.EXPIRED, 1)
    contract.open_round(signers[1], run)
    assert contract.view_run(run).expected == {0}


def test_every_contract_error_is_mapped() -> None:
    names = {entry["name"] for entry in load_artifact()["abi"] if entry["type"] == "error"}
    assert names == set(CONTRACT_ERRORS)
    for entry in load_artifact()["abi"]:
        if entry["type"] == "error":
            values = {i["name"]: 1 for i in entry["inputs"]}
            assert "\n" not in CONTRACT_ERRORS[entry["name"]](**values).message


def test_invalid_outsider(world: World) -> None:
    outsider = make_signers(4)[3]
    with pytest.raises(errors.NotSite, match=outsider.address):
        world.contract.propose_run(outsider, spec=SPEC, terms=Terms(1, 1, 1))


def test_invalid_second_commit(world: World) -> None:
    run = start_run(world)
    world.contract.open_round(world.signers[0], run)
    world.contract.commit(world.signers[0], run, 1, C1)
    with pytest.raises(errors.AlreadyCommitted):
        world.contract.commit(world.signers[0], run, 1, M1)


def test_invalid_vote_in_commit_phase(world: World) -> None:
    run = start_run(world)
    world.contract.open_round(world.signers[0], run)
    with pytest.raises(errors.WrongPhase, match="COMMIT, the call needs phase VOTE"):
        world.contract.vote(world.signers[0], (run, 1), C1, M1, accept=True, score_bps=0)


def test_invalid_unknown_run(world: World) -> None:
    with pytest.raises(errors.UnknownRun, match="no run 7"):
        world.contract.view_run(7)


def test_invalid_chain_id(world: World) -> None:
    other = world.deployment.model_copy(update={"chain_id": 5})
    with pytest.raises(ChainError, match="is on chain 31337, the deployment on 5"):
        SwarmContract(world.contract.node, other)


def test_invalid_contract_address(world: World) -> None:
    other = world.deployment.model_copy(update={"contract": "0x" + "12" * 20})
    with pytest.raises(ChainError, match="no code lies at"):
        SwarmContract(world.contract.node, other)


def test_invalid_rpc_url_that_nobody_answers(unused_port: int) -> None:
    with pytest.raises(ChainUnreachable, match="no Ethereum node answers") as caught:
        Node(f"http://127.0.0.1:{unused_port}")
    assert caught.value.exit_code == 3


def test_invalid_devchain_port_in_use(anvil: Devchain) -> None:
    port = int(anvil.rpc_url.rsplit(":", 1)[1])
    with pytest.raises(DevchainError, match=f"port {port} cannot be used"), start_devchain("anvil", port=port):
        pass


def test_invalid_anvil_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMCHAIN_ANVIL", "/nowhere/anvil")
    with pytest.raises(DevchainError, match="/nowhere/anvil"), start_devchain("anvil"):
        pass


def test_shipped_contract_is_what_the_sources_compile_to() -> None:
    command = [sys.executable, str(ROOT / "deploy" / "compile.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hardhat_compiles_to_the_same_bytes(tmp_path: Path) -> None:
    script = ROOT / "node_modules" / "hardhat" / "internal" / "cli" / "bootstrap.js"
    done = subprocess.run(["node", str(script), "compile", "--quiet"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((ROOT / "build/hardhat/contracts/Swarm.sol/Swarm.json").read_text())
    assert found["bytecode"] == "0x" + load_artifact()["bytecode"]
