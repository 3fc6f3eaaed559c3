"""Transactions that get lost, wait, or meet another of their nonce; nodes that lag, lie or fall silent."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import urllib3
from conftest import World, make_world

from swarmchain.chain import SwarmContract
from swarmchain.devchain import start_devchain
from swarmchain.errors import ChainMismatch, ChainUnreachable, ConfigError, JournalError, SwarmError
from swarmchain.journal import Journal
from swarmchain.node import Node
from swarmchain.outbox import Outbox
from swarmchain.profiles import BESU_QBFT, choose_profile
from swarmchain.protocol import Phase, Terms

SPEC, C1, C2 = "ab" * 32, "11" * 32, "22" * 32


@contextlib.contextmanager
def open_outbox(world: World, folder: Path) -> Iterator[tuple[SwarmContract, Journal]]:
    """The contract as the first site uses it, over a node of its own that gives up on receipts after half a second."""
    node = Node(world.contract.node.rpc_url)
    node.profile = dataclasses.replace(node.profile, receipt_timeout_s=0.5)
    contract = SwarmContract(node, world.deployment)
    journal = Journal(folder, chain_id=contract.chain_id, contract=contract.address, site=0)
    contract.send = Outbox(node, journal).send
    with contextlib.closing(journal):
        yield contract, journal


def rpc(world: World, method: str, *params: object) -> object:
    answer = world.contract.node.web3.provider.make_request(method, list(params))  # type: ignore[arg-type]
    assert "error" not in answer, answer
    return answer["result"]


def start_run(world: World) -> int:
    run = world.contract.propose_run(world.signers[0], spec=SPEC, terms=Terms(100, 50, 2))
    for signer in world.signers:
        world.contract.join_run(signer, run)
    world.contract.open_round(world.signers[0], run)
    return run


@pytest.fixture
def own_chain() -> Iterator[World]:
    with start_devchain("anvil") as chain:
        yield make_world(chain)


def test_dropped_transaction_is_sent_again_with_the_same_bytes(own_chain: World, tmp_path: Path) -> None:
    run, signer = start_run(own_chain), own_chain.signers[0]
    rpc(own_chain, "evm_setAutomine", False)
    with open_outbox(own_chain, tmp_path) as (contract, journal):
        with pytest.raises(ChainUnreachable, match=r"\(commit\) is in no block yet"):
            contract.commit(signer, run, 1, C1)
        [promised] = journal.get_pending(signer.address)
        rpc(own_chain, "anvil_dropAllTransactions")
        assert not contract.node.knows(promised.digest)
    rpc(own_chain, "evm_setAutomine", True)
    with open_outbox(own_chain, tmp_path) as (contract, journal):  # the process was restarted
        Outbox(contract.node, journal).settle(signer)
        assert journal.get_pending(signer.address) == []
        assert contract.node.get_receipt(promised.digest)["status"] == 1
        assert contract.view_run(run).commitments == {0: C1}


def test_blocks_that_the_chain_lost_are_filled_again(own_chain: World, tmp_path: Path) -> None:
    """The chain goes back behind two transactions, of which the journal thinks that one is done."""
    run, signer = start_run(own_chain), own_chain.signers[0]
    snapshot = rpc(own_chain, "evm_snapshot")
    with open_outbox(own_chain, tmp_path) as (contract, journal):
        contract.commit(signer, run, 1, C1)
        rpc(own_chain, "evm_setAutomine", False)
        with pytest.raises(ChainUnreachable):
            contract.announce(signer, run)
        rpc(own_chain, "evm_revert", snapshot)
        rpc(own_chain, "evm_setAutomine", True)
        assert own_chain.contract.view_run(run).committed == frozenset()
        Outbox(contract.node, journal).settle(signer)
        assert journal.get_pending(signer.address) == []
        assert contract.view_run(run).commitments == {0: C1}


def test_fee_that_became_too_low_is_raised_under_the_same_nonce(own_chain: World, tmp_path: Path) -> None:
    run, signer, gwei = start_run(own_chain), own_chain.signers[0], 10**9
    rpc(own_chain, "anvil_setBalance", signer.address, hex(10**20))
    rpc(own_chain, "anvil_setNextBlockBaseFeePerGas", hex(gwei))
    rpc(own_chain, "evm_mine")
    rpc(own_chain, "evm_setAutomine", False)
    with open_outbox(own_chain, tmp_path) as (contract, journal):
        with pytest.raises(ChainUnreachable):
            contract.commit(signer, run, 1, C1)
        [promised] = journal.get_pending(signer.address)
        rpc(own_chain, "anvil_setNextBlockBaseFeePerGas", hex(100 * gwei))
        rpc(own_chain, "evm_mine")
        rpc(own_chain, "evm_setAutomine", True)
        Outbox(contract.node, journal, now=lambda: time.time() + 120).settle(signer)
        assert journal.get_pending(signer.address) == []
        raised = journal.get_recent(signer.address, from_nonce=promised.nonce)[-1]
        assert (raised.nonce, raised.call) == (promised.nonce, promised.call)
        assert raised.fees["maxFeePerGas"] >= 100 * gwei > promised.fees["maxFeePerGas"]
        assert contract.view_run(run).commitments == {0: C1}


def test_two_processes_of_one_site_take_turns(world: World, tmp_path: Path) -> None:
    run, signer = start_run(world), world.signers[0]
    before = world.contract.node.get_nonce(signer.address)

    def announce() -> None:
        with open_outbox(world, tmp_path) as (contract, _):
            for _ in range(5):
                contract.announce(signer, run)

    threads = [threading.Thread(target=announce) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert world.contract.node.get_nonce(signer.address) == before + 10
    with open_outbox(world, tmp_path) as (_, journal):
        assert journal.get_pending(signer.address) == []


def test_journal_on_a_full_disk_stops_before_sending(own_chain: World, tmp_path: Path) -> None:
    run, signer = start_run(own_chain), own_chain.signers[0]
    with open_outbox(own_chain, tmp_path) as (contract, journal):
        journal._db.execute("pragma max_page_count = 1")  # SQLite then says what it says on a full disk
        with pytest.raises(JournalError, match="full"):
            while True:
                contract.send(signer, {"to": contract.address, "data": "0x" + "00" * 4_000}, gas=200_000, purpose="x")
        journal._db.execute("pragma max_page_count = 100000")
        before = contract.node.get_nonce(signer.address)
        contract.commit(signer, run, 1, C1)
        assert contract.node.get_nonce(signer.address) == before + 1


# -- nodes


class Broken(http.server.BaseHTTPRequestHandler):
    """A server that answers, but not as a node."""

    status, body = 503, b"busy"

    def do_POST(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serve(handler: type[Broken]) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Chatty(Broken):
    status, body = 200, b"<html>welcome</html>"


@pytest.mark.parametrize("handler", [Broken, Chatty])
def test_node_that_fails_is_passed_over(world: World, unused_port: int, handler: type[Broken]) -> None:
    good = world.contract.node.rpc_url
    with serve(handler) as bad:
        node = Node([f"http://127.0.0.1:{unused_port}", bad, good])
        contract = SwarmContract(node, world.deployment)
        assert node.rpc_url == good
        assert len(contract.get_sites()) == 3


class Guarded(Broken):
    """A proxy that lets in who knows the password, under one path."""

    node, seen = "", ""

    def do_POST(self) -> None:
        Guarded.seen = self.path
        expected = base64.b64encode("nörd:p/w@1".encode()).decode()
        if self.headers.get("Authorization") != f"Basic {expected}":
            self.status, self.body = 401, b"who are you?"
            return super().do_POST()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        answer = urllib3.request("POST", self.node, body=data, headers={"Content-Type": "application/json"})
        self.status, self.body = answer.status, answer.data
        super().do_POST()


def test_node_behind_a_password_answers_and_no_message_shows_it(world: World, unused_port: int) -> None:
    Guarded.node = world.contract.node.rpc_url
    with serve(Guarded) as guard:
        user = quote("nörd:p/w@1", safe=":")
        node = Node(guard.replace("://", f"://{user}@") + "/token77?key=token78")
        assert len(SwarmContract(node, world.deployment).get_sites()) == 3
        assert Guarded.seen == "/token77?key=token78" and node.rpc_url == f"{guard}/…"
        told = [str(node.endpoints.endpoints)]
        for url in (f"http://…127.0.0.1:{unused_port}/token77", guard.replace("://", "://…") + "/token77",
                    f"ws://…127.0.0.1:{unused_port}", "http://…[::1/token77", "…localhost:8545/token77", "http://me:secret/…h"):
            with pytest.raises(SwarmError) as caught:
                Node(url.replace("…", "me:secret@"))
            told.append(f"{caught.value.message} {caught.value.hint}")
    assert "HTTP 401" in told[2] and all("@" in words and "no http(s) URL" in words for words in told[3:])
    for words in told:
        assert not any(hidden in words for hidden in (user, "p/w", "secret", "token77")), words


def test_node_that_goes_is_left_and_the_other_is_checked_first(world: World) -> None:
    """The second node is of a chain without our contract: better no answer than another chain's."""
    with start_devchain("anvil") as stranger, start_devchain("anvil") as first:
        own = make_world(first)
        node = Node([first.rpc_url, stranger.rpc_url], timeout_s=2.0)
        contract = SwarmContract(node, own.deployment)
        assert len(contract.get_sites()) == 3
        first.process.terminate()
        first.process.wait(timeout=10)
        with pytest.raises(ChainMismatch, match="no code lies at"):
            contract.get_sites()


def test_node_that_lags_is_left_for_one_that_does_not(world: World) -> None:
    with start_devchain("anvil") as behind:
        good = world.contract.node.rpc_url
        node = Node([behind.rpc_url, good])
        rpc(world, "anvil_mine", "0x5")
        node.choose_freshest()
        assert node.rpc_url == good


def test_node_that_is_ahead_on_another_chain_is_not_preferred(world: World) -> None:
    with start_devchain("anvil") as stranger:
        good = world.contract.node.rpc_url
        node = Node([good, stranger.rpc_url])
        contract = SwarmContract(node, world.deployment)
        blocks = hex(contract.node.read_head() + 50)
        Node(stranger.rpc_url, timeout_s=60.0).web3.provider.make_request("anvil_mine", [blocks])  # type: ignore[arg-type]
        node.choose_freshest()
        assert node.rpc_url == good
        assert len(contract.get_sites()) == 3


def test_invalid_rpc_urls() -> None:
    for urls in ("ws://127.0.0.1:1", []):
        with pytest.raises(ConfigError, match="no http"):
            Node(urls)


def test_invalid_deployment_of_another_chain(world: World) -> None:
    other = world.deployment.model_copy(update={"chain_id": 5})
    with pytest.raises(ChainMismatch, match="is on chain 31337, the deployment on 5"):
        SwarmContract(Node(world.contract.node.rpc_url), other)


# -- profiles


def test_profile_is_told_from_the_client() -> None:
    assert choose_profile("auto", "anvil/v1.7.1").name == "anvil"
    assert choose_profile("auto", "HardhatNetwork/2.29.1").name == "hardhat"
    assert choose_profile("auto", "besu/v25.1.0/linux-x86_64/openjdk-java-21") is BESU_QBFT
    assert choose_profile("besu-qbft", "anvil/v1.7.1") is BESU_QBFT


def test_besu_profile_drives_a_round_on_a_chain_with_block_times() -> None:
    """Blocks every second, no pending block, gas price 0 said explicitly, logs in pieces. Anvil stands in for Besu."""
    with start_devchain("anvil", options=("--block-time", "1")) as chain:
        world, node = make_world(chain), Node(chain.rpc_url, profile="besu-qbft")
        world.contract = SwarmContract(node, world.deployment)
        assert node.read_fees() == {"gasPrice": 0}
        run = start_run(world)
        for signer in world.signers:
            world.contract.commit(signer, run, 1, C1)
        for signer in world.signers[:2]:
            world.contract.vote(signer, (run, 1), C1, C2, accept=True, score_bps=0)
        assert world.contract.view_run(run).phase is Phase.CLOSED
        for span in (1, 3, 1000):
            node.profile = dataclasses.replace(BESU_QBFT, logs_span=span)
            assert [e.name for e in world.contract.get_events(["Committed", "RoundFinalized"], run=run)] == [
                "Committed"] * 3 + ["RoundFinalized"]
