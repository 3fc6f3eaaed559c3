"""The contract as typed Python: a method per function, a dataclass per event.

A transaction is tried with `eth_call` first, so that a refusal costs nothing and is told in words. Beside `node`, which
translates the errors, the only room that knows web3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from eth_abi.abi import decode as abi_decode
from eth_abi.abi import encode as abi_encode
from eth_abi.exceptions import DecodingError
from eth_utils.abi import function_abi_to_4byte_selector, get_abi_input_types, get_abi_output_types
from eth_utils.address import to_checksum_address
from web3.logs import DISCARD

from swarmchain.config import Deployment
from swarmchain.errors import ChainError, ConfigError
from swarmchain.keys import Signer
from swarmchain.node import Node, load_artifact
from swarmchain.protocol import Change, Outcome, Phase, RoundKey, RunView, Terms, mask_to_sites

# Above what a call can need (contracts/snapshot.json), below any block's limit.
GAS_MAX = {"propose": 400_000, "approve": 300_000, "setSealKey": 100_000, "proposeRun": 400_000, "joinRun": 250_000,
           "leaveRun": 150_000, "announce": 150_000, "openRound": 200_000, "commit": 150_000, "vote": 250_000}
DEPLOY_GAS_BASE, DEPLOY_GAS_PER_SITE = 3_200_000, 90_000


class Send(Protocol):
    """Signs and sends one transaction, and returns its receipt."""

    def __call__(self, signer: Signer, call: Mapping[str, Any], *, gas: int, purpose: str) -> Any:
        """Raises `ChainUnreachable` while no block takes it in."""
        ...


@dataclass(frozen=True)
class SiteRecord:
    """One site as the contract holds it. `active` is False once it was removed or the consortium has retired.

    `seal_key` is its X25519 public key as hex, "" until it has set one.
    """

    site: int
    address: str
    name: str
    active: bool
    seal_key: str


@dataclass(frozen=True)
class ChangeProposal:
    """A proposed change of the consortium. `data` is hex; who approved and was removed since counts no more."""

    proposal: int
    kind: Change
    subject: str
    data: str
    deadline: int
    executed: bool
    approvals: frozenset[int]


@dataclass(frozen=True)
class Event:
    """One event of the contract, its arguments by their Solidity names, digests as hex without 0x."""

    name: str
    block: int
    index: int
    transaction: str
    values: dict[str, Any]


class SwarmContract:
    """One consortium's contract.

    Parameters
    ----------
    send
        Sends transactions: `Outbox.send` for a site, else `Node.send`.

    Raises
    ------
    ChainMismatch
        If the node is on another chain, or another code (or none) lies at the address.
    """

    def __init__(self, node: Node, deployment: Deployment, *, send: Send | None = None) -> None:
        self.node = node
        self.chain_id = deployment.chain_id
        self.block = deployment.block
        self.address = to_checksum_address(deployment.contract)
        self.send: Send = send or node.send
        node.require(self.chain_id, self.address, code_digest())
        self._events = node.web3.eth.contract(address=self.address, abi=load_artifact()["abi"]).events

    # -- reading

    def get_sites(self) -> list[SiteRecord]:
        """All sites, by index."""
        active = mask_to_sites(int(self._call("activeSites")))
        records = []
        for i in range(int(self._call("siteCount"))):
            key, name, seal_key = self._call("siteAt", i)
            sealed = seal_key.hex() if any(seal_key) else ""
            records.append(SiteRecord(i, to_checksum_address(key), _text(name), i in active, sealed))
        return records

    def get_site_index(self, address: str) -> int:
        """Index of the site that signs with `address`. Raises `NotSite` for anyone else."""
        return int(self._call("siteOf", to_checksum_address(address)))

    def get_successor(self) -> str:
        """Address of the contract that the consortium moved to, "" while it is here."""
        return _to_address(self._call("successor"))

    def get_proposals(self) -> list[ChangeProposal]:
        """All proposed changes, whatever became of them."""
        proposals = []
        for i in range(1, int(self._call("proposalCount")) + 1):
            subject, kind, deadline, executed, data, approvals = self._call("proposalAt", i)
            about = (Change(kind), to_checksum_address(subject), data.hex(), deadline, executed)
            proposals.append(ChangeProposal(i, *about, mask_to_sites(approvals)))
        return proposals

    def get_run_count(self) -> int:
        """Number of runs; they are counted from 1."""
        return int(self._call("runCount"))

    def view_run(self, run: int, *, at: int | None = None, block: int | None = None) -> RunView:
        """The run as of `at` (a timestamp), or as of now; with `block`, as that block left it. Raises `UnknownRun`."""
        now = self.node.read_time() if at is None else at
        return _to_view(run, self._call("viewRun", run, now, block="latest" if block is None else hex(block)), now)

    def get_phase(self, run: int, round_id: int, *, at: int) -> tuple[Phase, Outcome]:
        """Phase and outcome of any round as of `at`."""
        phase, outcome = self._call("phaseAt", run, round_id, at)
        return Phase(phase), Outcome(outcome)

    def get_accepting(self, run: int, checkpoint: str, manifest: str) -> frozenset[int]:
        """Members that accept one (checkpoint, manifest) in the newest round."""
        mask = self._call("acceptingOf", run, bytes.fromhex(checkpoint), bytes.fromhex(manifest))
        return mask_to_sites(int(mask))

    def get_events(self, names: Sequence[str], *, run: int | None = None, from_block: int | None = None,
                   to_block: int | None = None) -> list[Event]:
        """Events of these names, in the chain's order; `run` keeps those of one run.

        They are fetched in pieces of the profile's `logs_span` blocks, from `from_block` or the deployment on, to
        `to_block` or the newest.
        """
        span, head = self.node.profile.logs_span, self.node.read_head() if to_block is None else to_block
        found: list[Event] = []
        for start in range(self.block if from_block is None else from_block, head + 1, span):
            for name in names:
                event = getattr(self._events, name)()
                about: dict[str, Any] = {"from_block": start, "to_block": min(start + span - 1, head),
                                         "argument_filters": {"run": run} if run is not None else {}}
                found += [_to_event(log) for log in self.node.ask(lambda e=event, a=about: e.get_logs(**a))]  # type: ignore[misc]
        return sorted(found, key=lambda e: (e.block, e.index))

    def get_gas(self, transaction: str) -> int:
        """Gas that a transaction used."""
        receipt = self.node.get_receipt(transaction)
        if receipt is None:
            raise ChainError(f"the node knows no transaction {transaction[:12]}…", hint="has it forgotten old blocks?")
        return int(receipt["gasUsed"])

    def key_of(self, run: int, round_id: int) -> RoundKey:
        """What a commitment of this round is bound to."""
        return RoundKey(self.chain_id, self.address, run, round_id)

    # -- writing; each returns the gas used

    def propose_run(self, signer: Signer, *, spec: str, terms: Terms) -> int:
        """Propose a run and return its number."""
        words = (terms.commit_window_s, terms.vote_window_s, terms.sites_min, terms.quorum_bps)
        receipt = self._transact(signer, "proposeRun", bytes.fromhex(spec), words)
        logs = self._events.RunProposed().process_receipt(receipt, errors=DISCARD)
        return int(logs[0]["args"]["run"])

    def propose_change(self, signer: Signer, kind: Change, *, subject: str, data: str = "") -> int:
        """Propose a change of the consortium, approve it, and return its number.

        Parameters
        ----------
        subject
            Address: the new site's, the present site's, or the successor's.
        data
            32 bytes as hex: the new site's name (see `encode_name`), or the new key, left-padded; "" for none.
        """
        words = (int(kind), to_checksum_address(subject), bytes.fromhex(data.rjust(64, "0")))
        receipt = self._transact(signer, "propose", *words)
        logs = self._events.ChangeProposed().process_receipt(receipt, errors=DISCARD)
        return int(logs[0]["args"]["proposal"])

    def approve_change(self, signer: Signer, proposal: int) -> int:
        """Approve a proposed change; the approval that completes a majority carries it out."""
        return self._gas(self._transact(signer, "approve", proposal))

    def set_seal_key(self, signer: Signer, seal_key: str) -> int:
        """Publish this site's X25519 public key (hex)."""
        return self._gas(self._transact(signer, "setSealKey", bytes.fromhex(seal_key)))

    def leave_run(self, signer: Signer, run: int) -> int:
        """Withdraw from a run, from its next round on."""
        return self._gas(self._transact(signer, "leaveRun", run))

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

    def _call(self, name: str, *arguments: Any, block: str = "latest") -> Any:
        call = {"to": self.address, "data": encode_call(name, arguments)}
        return decode_results(name, self.node.call(call, block=block))

    def _transact(self, signer: Signer, name: str, *arguments: Any) -> Any:
        call = {"to": self.address, "data": encode_call(name, arguments)}
        trial = {**call, "from": signer.address}
        self.node.call(trial, block=self.node.profile.trial_block)
        receipt = self.send(signer, call, gas=GAS_MAX[name], purpose=name)
        if receipt["status"] != 1:
            # the world moved between the trial and the block: ask again for the reason
            self.node.call(trial)
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
    receipt = node.send(signer, {"data": data}, gas=gas, purpose="deployment")
    if receipt["status"] != 1:
        raise ChainError("the deployment failed", hint="does the account have funds, and the chain room for 5 M gas?")
    return Deployment(
        chain_id=node.chain_id, contract=receipt["contractAddress"], block=receipt["blockNumber"],
        code_sha256=code_digest(), sites={name: address for address, name in founders},
    )


def encode_call(name: str, arguments: Sequence[Any]) -> str:
    """Data of a call of one function, as hex."""
    selector, types, _ = _signatures()[name]
    return "0x" + (selector + abi_encode(types, arguments)).hex()


def decode_results(name: str, data: bytes) -> Any:
    """What one function returned: a value, or a tuple of them; structs are tuples. Raises `ChainError`."""
    _, _, types = _signatures()[name]
    try:
        values = abi_decode(types, data)
    except (DecodingError, OverflowError) as exc:
        raise ChainError(f"the contract's answer to {name} is none: {len(data)} bytes", hint="is the node in order?"
                         ) from exc
    return values[0] if len(values) == 1 else values


@cache
def _signatures() -> dict[str, tuple[bytes, list[str], list[str]]]:
    """Selector, and types of arguments and results, of every function. web3 would work them out at every call."""
    functions: list[Any] = [entry for entry in load_artifact()["abi"] if entry["type"] == "function"]
    return {entry["name"]: (function_abi_to_4byte_selector(entry), get_abi_input_types(entry),
                            get_abi_output_types(entry)) for entry in functions}


def code_digest() -> str:
    """SHA-256 of the contract's runtime code; it has no immutables, so it is the same at every address."""
    return hashlib.sha256(bytes.fromhex(load_artifact()["runtime"])).hexdigest()


def encode_name(name: str) -> bytes:
    """A site's name as the contract holds it: UTF-8 in 32 bytes. Raises `ConfigError`."""
    data = name.encode()
    if not 1 <= len(data) <= 32:
        raise ConfigError(f"the site name {name!r} is not 1 to 32 bytes long", hint="shorten it")
    return data.ljust(32, b"\0")


def _to_view(run: int, raw: Any, now: int) -> RunView:
    v = dict(zip(_view_fields(), raw, strict=True))
    sites = {k: mask_to_sites(v[k]) for k in ("joined", "members", "expected", "committed", "voted", "rejecting")}
    return RunView(
        run=run, spec=v["spec"].hex(), terms=Terms(*v["terms"]), proposer=v["proposer"],
        successor=_to_address(v["successor"]), round_id=v["round"],
        phase=Phase(v["phase"]), outcome=Outcome(v["outcome"]), commit_deadline=v["commitDeadline"],
        vote_deadline=v["voteDeadline"], quorum=v["quorum"],
        finalized_round=v["finalizedRound"], checkpoint=v["checkpoint"].hex(), manifest=v["manifest"].hex(),
        head=v["head"].hex(), failures=v["failures"], rejections=v["rejections"], now=now, **sites,
        commitments={i: c.hex() for i, c in enumerate(v["commitments"]) if any(c)},
    )


@cache
def _view_fields() -> list[str]:
    """Names of the fields of ISwarm.RunView, in their order."""
    return [c["name"] for entry in load_artifact()["abi"] if entry.get("name") == "viewRun"
            for c in entry["outputs"][0]["components"]]


def _to_address(word: str) -> str:
    """The address with its checksum, "" for the zero address."""
    return to_checksum_address(word) if int(word, 16) else ""


def _to_event(log: Any) -> Event:
    values = {k: v.hex() if isinstance(v, bytes) else v for k, v in log["args"].items()}
    return Event(log["event"], int(log["blockNumber"]), int(log["logIndex"]), log["transactionHash"].hex(), values)


def _text(name: bytes) -> str:
    return name.rstrip(b"\0").decode("utf-8", errors="replace")
