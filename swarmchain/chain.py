"""The contract as typed Python: a method per function, a dataclass per event. The only room that knows web3.

Every foreign error is translated here: a revert becomes the exception of its name, a silent node becomes
`ChainUnreachable`. A transaction is tried with `eth_call` first, so that a refusal costs nothing and is told in words.
What the chain's time is, the node says: the pending block's timestamp, or the latest one's where no block is pending.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, TypeVar

import requests
from eth_abi.abi import decode as abi_decode
from eth_utils.abi import function_abi_to_4byte_selector
from eth_utils.address import to_checksum_address
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed
from web3 import HTTPProvider, Web3
from web3.exceptions import (
    ContractCustomError,
    ContractLogicError,
    TimeExhausted,
    Web3Exception,
    Web3RPCError,
)

from swarmchain.config import Deployment
from swarmchain.errors import CONTRACT_ERRORS, ChainError, ChainUnreachable, ConfigError, NonceTaken
from swarmchain.keys import Signer
from swarmchain.protocol import Outcome, Phase, RoundKey, RunView, Terms, mask_to_sites

T = TypeVar("T")

# Above what a call can need (the snapshot of gas in the contract's tests), below any block's limit.
GAS_MAX = {"proposeRun": 400_000, "joinRun": 200_000, "announce": 150_000, "openRound": 300_000,
           "commit": 250_000, "vote": 400_000}
DEPLOY_GAS_BASE, DEPLOY_GAS_PER_SITE = 4_500_000, 120_000
RECEIPT_TIMEOUT_S = 60.0
SENDS_MAX = 20
# geth and Anvil, Hardhat, Besu: how nodes say that another transaction of this key has the nonce
NONCE_WORDS = re.compile(
    "nonce too low|nonce has already been used|replacement transaction underpriced|already known|already imported"
    "|known transaction|below current nonce", re.IGNORECASE)


@dataclass(frozen=True)
class SiteRecord:
    """One site as the contract holds it."""

    site: int
    address: str
    name: str


@dataclass(frozen=True)
class Event:
    """One event of the contract, its arguments by their Solidity names, digests as hex without 0x."""

    name: str
    block: int
    transaction: str
    values: dict[str, Any]


@cache
def load_artifact() -> dict[str, Any]:
    """ABI, creation and runtime bytecode of the contract, as shipped."""
    text = resources.files("swarmchain").joinpath("contract/Swarm.json").read_text(encoding="utf-8")
    artifact: dict[str, Any] = json.loads(text)
    return artifact


class Node:
    """A connection to one Ethereum node.

    Raises
    ------
    ChainUnreachable
        If nothing answers at `rpc_url`.
    """

    def __init__(self, rpc_url: str, *, timeout_s: float = 10.0) -> None:
        self.rpc_url = rpc_url
        if not rpc_url.startswith(("http://", "https://")):
            raise ConfigError(f"rpc_url {rpc_url!r} is no http(s) URL", hint="for example http://127.0.0.1:8545")
        provider = HTTPProvider(rpc_url, request_kwargs={"timeout": timeout_s}, exception_retry_configuration=None)
        self.web3 = Web3(provider)
        self.chain_id = int(self.ask(lambda: self.web3.eth.chain_id))

    def ask(self, question: Callable[[], T]) -> T:
        """One exchange with the node; silence becomes `ChainUnreachable`."""
        with translate_errors(self.rpc_url):
            return question()

    @property
    def client_version(self) -> str:
        """What the node calls itself, for example `anvil/v1.7.1`."""
        return str(self.ask(lambda: self.web3.client_version))

    def read_time(self) -> int:
        """Timestamp that a transaction sent now would see, in seconds."""
        for block in ("pending", "latest"):
            try:
                found: Any = self.ask(lambda block=block: self.web3.eth.get_block(block))  # type: ignore[misc]
            except ChainError:
                continue
            if found is not None and found.get("timestamp"):
                return int(found["timestamp"])
        raise ChainError(f"the node at {self.rpc_url} shows no block", hint="is it still starting?")

    def send(self, signer: Signer, call: dict[str, Any], *, gas: int) -> Any:
        """Sign and send one transaction, wait for its receipt and return it.

        A person and an agent may use one site's key at the same moment; who finds the nonce taken takes the next.
        """
        for attempt in Retrying(retry=retry_if_exception_type(NonceTaken), stop=stop_after_attempt(SENDS_MAX),
                                wait=wait_fixed(0.05), reraise=True):
            with attempt:
                digest = self._send_once(signer, call, gas=gas)
        try:
            return self.ask(lambda: self.web3.eth.wait_for_transaction_receipt(
                digest, timeout=RECEIPT_TIMEOUT_S, poll_latency=0.05))
        except TimeExhausted as exc:
            raise ChainUnreachable(
                f"transaction {digest.hex()[:12]}… is in no block after {RECEIPT_TIMEOUT_S:.0f} s",
                hint="has the chain stalled? the agent looks again before it sends another",
            ) from exc

    def _send_once(self, signer: Signer, call: dict[str, Any], *, gas: int) -> Any:
        fees = self._fees()
        transaction = {
            **call, **fees, "chainId": self.chain_id, "gas": gas, "value": 0,
            "nonce": self.ask(lambda: self.web3.eth.get_transaction_count(signer.address, "pending")),  # type: ignore[arg-type]
        }
        raw = signer.sign_transaction(transaction)
        return self.ask(lambda: self.web3.eth.send_raw_transaction(raw))

    def _fees(self) -> dict[str, int]:
        """Free where the chain is free (permissioned chains are), else twice the base fee and the suggested tip."""
        base = self.ask(lambda: self.web3.eth.get_block("latest")).get("baseFeePerGas", 0)
        if not base:
            return {"gasPrice": 0}
        tip = self.ask(lambda: self.web3.eth.max_priority_fee)
        return {"maxFeePerGas": 2 * base + tip, "maxPriorityFeePerGas": tip}


class SwarmContract:
    """One consortium's contract, seen through one node.

    Raises
    ------
    ChainError
        If the node is on another chain, or another code (or none) lies at the address.
    """

    def __init__(self, node: Node, deployment: Deployment) -> None:
        self.node = node
        self.chain_id = deployment.chain_id
        if node.chain_id != deployment.chain_id:
            raise ChainError(
                f"the node at {node.rpc_url} is on chain {node.chain_id}, the deployment on {deployment.chain_id}",
                hint="point rpc_url at a node of the consortium's chain, or use the right deployments/<chain id>.json",
            )
        self.address = to_checksum_address(deployment.contract)
        code = bytes(node.ask(lambda: node.web3.eth.get_code(self.address)))
        if hashlib.sha256(code).hexdigest() != code_digest():
            found = "no code" if not code else "another code than this version's contract"
            raise ChainError(
                f"{found} lies at {self.address} on chain {self.chain_id}",
                hint="check the deployment file; a dev chain forgets everything when it stops",
            )
        self._contract = node.web3.eth.contract(address=self.address, abi=load_artifact()["abi"])

    # -- reading

    def get_sites(self) -> list[SiteRecord]:
        """All sites, by index."""
        records = []
        for i in range(int(self._call("siteCount"))):
            site = self._call("siteAt", i)
            key, name = (site["key"], site["name"]) if isinstance(site, dict) else site
            records.append(SiteRecord(i, to_checksum_address(key), _text(name)))
        return records

    def get_site_index(self, address: str) -> int:
        """Index of the site that signs with `address`. Raises `NotSite` for anyone else."""
        return int(self._call("siteOf", to_checksum_address(address)))

    def get_run_count(self) -> int:
        """Number of runs; they are counted from 1."""
        return int(self._call("runCount"))

    def view_run(self, run: int, *, at: int | None = None) -> RunView:
        """The run as of `at` (a timestamp), or as of now. Raises `UnknownRun`."""
        now = self.node.read_time() if at is None else at
        return _to_view(run, self._call("viewRun", run, now), now)

    def get_phase(self, run: int, round_id: int, *, at: int) -> tuple[Phase, Outcome]:
        """Phase and outcome of any round as of `at`."""
        phase, outcome = self._call("phaseAt", run, round_id, at)
        return Phase(phase), Outcome(outcome)

    def get_accepting(self, run: int, round_id: int, checkpoint: str, manifest: str) -> frozenset[int]:
        """Members that accept one (checkpoint, manifest)."""
        mask = self._call("acceptingOf", run, round_id, bytes.fromhex(checkpoint), bytes.fromhex(manifest))
        return mask_to_sites(int(mask))

    def get_events(self, names: Sequence[str], *, run: int | None = None, from_block: int = 0) -> list[Event]:
        """Events of these names, in the chain's order; `run` keeps those of one run."""
        found: list[Event] = []
        for name in names:
            event = getattr(self._contract.events, name)()
            filters = {"run": run} if run is not None else {}
            logs = self.node.ask(lambda event=event, filters=filters: event.get_logs(  # type: ignore[misc]
                from_block=from_block, argument_filters=filters))
            found += [_to_event(log) for log in logs]
        return sorted(found, key=lambda e: e.block)

    def get_gas(self, transaction: str) -> int:
        """Gas that a transaction used."""
        return int(self.node.ask(lambda: self.node.web3.eth.get_transaction_receipt("0x" + transaction))["gasUsed"])  # type: ignore[arg-type]

    def key_of(self, run: int, round_id: int) -> RoundKey:
        """What a commitment of this round is bound to."""
        return RoundKey(self.chain_id, self.address, run, round_id)

    # -- writing; each returns the gas used

    def propose_run(self, signer: Signer, *, spec: str, terms: Terms) -> int:
        """Propose a run and return its number."""
        words = (terms.commit_window_s, terms.vote_window_s, terms.sites_min, terms.quorum_bps)
        receipt = self._transact(signer, "proposeRun", bytes.fromhex(spec), words)
        logs = self._contract.events.RunProposed().process_receipt(receipt)
        return int(logs[0]["args"]["run"])

    def join_run(self, signer: Signer, run: int) -> int:
        """Opt in to a run."""
        return self._gas(self._transact(signer, "joinRun", run))

    def announce(self, signer: Signer, run: int) -> int:
        """Ask to be waited for in the next round."""
        return self._gas(self._transact(signer, "announce", run))

    def open_round(self, signer: Signer, run: int) -> int:
        """Open the next round."""
        return self._gas(self._transact(signer, "openRound", run))

    def commit(self, signer: Signer, run: int, round_id: int, commitment: str) -> int:
        """Commit to a contribution."""
        return self._gas(self._transact(signer, "commit", run, round_id, bytes.fromhex(commitment)))

    def vote(self, signer: Signer, key: tuple[int, int], checkpoint: str, manifest: str, *,
             accept: bool, score_bps: int) -> int:
        """Vote in (run, round) on one (checkpoint, manifest)."""
        arguments = (*key, bytes.fromhex(checkpoint), bytes.fromhex(manifest), accept, score_bps)
        return self._gas(self._transact(signer, "vote", *arguments))

    def _call(self, name: str, *arguments: Any) -> Any:
        return self.node.ask(lambda: self._contract.functions[name](*arguments).call())

    def _transact(self, signer: Signer, name: str, *arguments: Any) -> Any:
        function = self._contract.functions[name](*arguments)
        self.node.ask(lambda: function.call({"from": signer.address}, block_identifier="pending"))
        data = self._contract.encode_abi(name, args=list(arguments))
        receipt = self.node.send(signer, {"to": self.address, "data": data}, gas=GAS_MAX[name])
        if receipt["status"] != 1:
            # the world moved between the trial and the block: ask again for the reason
            self.node.ask(lambda: function.call({"from": signer.address}))
            raise ChainError(f"transaction {name} failed in block {receipt['blockNumber']} for no reason it gave")
        return receipt

    @staticmethod
    def _gas(receipt: Any) -> int:
        return int(receipt["gasUsed"])


def deploy_contract(node: Node, signer: Signer, founders: Sequence[tuple[str, str]]) -> Deployment:
    """Deploy a consortium of `founders`, (address, name) each, and return where it lies."""
    artifact = load_artifact()
    sites = [(to_checksum_address(address), encode_name(name)) for address, name in founders]
    factory = node.web3.eth.contract(abi=artifact["abi"], bytecode=artifact["bytecode"])
    data = node.ask(lambda: factory.constructor(sites).data_in_transaction)
    node.ask(lambda: node.web3.eth.call({"from": signer.address, "data": data}))
    gas = DEPLOY_GAS_BASE + DEPLOY_GAS_PER_SITE * len(sites)
    receipt = node.send(signer, {"data": data}, gas=gas)
    if receipt["status"] != 1:
        raise ChainError("the deployment failed", hint="does the account have funds, and the chain room for 5 M gas?")
    return Deployment(
        chain_id=node.chain_id, contract=receipt["contractAddress"], block=receipt["blockNumber"],
        code_sha256=code_digest(), sites={name: address for address, name in founders},
    )


def code_digest() -> str:
    """SHA-256 of the contract's runtime code; it has no immutables, so it is the same at every address."""
    return hashlib.sha256(bytes.fromhex(load_artifact()["runtime"])).hexdigest()


def encode_name(name: str) -> bytes:
    """A site's name as the contract holds it: UTF-8 in 32 bytes. Raises `ConfigError`."""
    data = name.encode()
    if not 1 <= len(data) <= 32:
        raise ConfigError(f"the site name {name!r} is not 1 to 32 bytes long", hint="shorten it")
    return data.ljust(32, b"\0")


@contextlib.contextmanager
def translate_errors(rpc_url: str) -> Iterator[None]:
    """The one seam where web3's errors become ours."""
    hint = "start it (`swarmchain devchain` on a laptop), or correct rpc_url"
    try:
        yield
    except (requests.RequestException, ConnectionError, TimeoutError) as exc:
        raise ChainUnreachable(f"no Ethereum node answers at {rpc_url}", hint=hint) from exc
    except ContractCustomError as exc:
        raise decode_revert(str(exc.data)) from exc
    except ContractLogicError as exc:
        if data := _find_revert_data(exc.data):
            raise decode_revert(data) from exc
        raise ChainError(f"the contract call reverted: {str(exc).splitlines()[0]}") from exc
    except Web3RPCError as exc:
        raise _decode_rpc_error(exc) from exc
    except TimeExhausted:
        raise
    except (Web3Exception, ValueError) as exc:
        line = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise ChainError(
            f"the node at {rpc_url} answered what no Ethereum node would: {line}", hint="is it an Ethereum RPC URL?"
        ) from exc


def decode_revert(data: str) -> ChainError:
    """The exception of a revert's data (hex); a plain `ChainError` where the ABI does not know it."""
    raw = bytes.fromhex(data.removeprefix("0x"))
    for entry in load_artifact()["abi"]:
        if entry["type"] == "error" and function_abi_to_4byte_selector(entry) == raw[:4]:
            values = abi_decode([i["type"] for i in entry["inputs"]], raw[4:])
            named = {i["name"]: v for i, v in zip(entry["inputs"], values, strict=True)}
            for item in entry["inputs"]:
                if item["type"] == "address":
                    named[item["name"]] = to_checksum_address(named[item["name"]])
            for name in ("phase", "needed"):
                if name in named:
                    named[name] = Phase(named[name]).name
            return CONTRACT_ERRORS[entry["name"]](**named)
    return ChainError(f"the contract refused with the unknown error 0x{raw[:4].hex()}")


def _decode_rpc_error(exc: Web3RPCError) -> ChainError:
    error: Any = (exc.rpc_response or {}).get("error", {})
    if data := _find_revert_data(error.get("data") if isinstance(error, dict) else None):
        return decode_revert(data)
    message = error.get("message", "") if isinstance(error, dict) else ""
    kind = NonceTaken if NONCE_WORDS.search(message) else ChainError
    return kind(f"the node refused: {message or exc}".splitlines()[0])


def _find_revert_data(data: Any) -> str:
    """Revert data as hex, wherever the node put it: Anvil in `data`, Hardhat in `data.data`; "" without any."""
    if isinstance(data, Mapping):
        data = data.get("data")
    return data if isinstance(data, str) and data.startswith("0x") and len(data) >= 10 else ""


def _to_view(run: int, raw: Any, now: int) -> RunView:
    names = [c["name"] for entry in load_artifact()["abi"] if entry.get("name") == "viewRun"
             for c in entry["outputs"][0]["components"]]
    v = dict(raw) if isinstance(raw, dict) else dict(zip(names, raw, strict=True))
    terms = tuple(v["terms"].values()) if isinstance(v["terms"], dict) else tuple(v["terms"])
    sites = {k: mask_to_sites(v[k]) for k in ("joined", "members", "expected", "committed", "voted", "rejecting")}
    return RunView(
        run=run, spec=v["spec"].hex(), terms=Terms(*terms), proposer=v["proposer"], round_id=v["round"],
        phase=Phase(v["phase"]), outcome=Outcome(v["outcome"]), opened_at=v["openedAt"],
        commit_deadline=v["commitDeadline"], vote_deadline=v["voteDeadline"], quorum=v["quorum"],
        finalized_round=v["finalizedRound"], checkpoint=v["checkpoint"].hex(), manifest=v["manifest"].hex(),
        head=v["head"].hex(), failures=v["failures"], rejections=v["rejections"], now=now, **sites,
        commitments={i: c.hex() for i, c in enumerate(v["commitments"]) if any(c)},
    )


def _to_event(log: Any) -> Event:
    values = {k: v.hex() if isinstance(v, bytes) else v for k, v in log["args"].items()}
    return Event(log["event"], int(log["blockNumber"]), log["transactionHash"].hex(), values)


def _text(name: bytes) -> str:
    return name.rstrip(b"\0").decode("utf-8", errors="replace")
