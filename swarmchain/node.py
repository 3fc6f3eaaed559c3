"""One Ethereum node: questions, transactions, and every foreign error translated at this one seam.

A revert becomes the exception of its name, a silent node becomes `ChainUnreachable`. What the chain's time is, the node
says: the pending block's timestamp, or the latest one's where no block is pending. Beside `chain`, the only room that
knows web3.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from importlib import resources
from typing import Any, Literal, TypeVar

from eth_abi.abi import decode as abi_decode
from eth_hash.auto import keccak
from eth_utils.abi import function_abi_to_4byte_selector
from eth_utils.address import to_checksum_address
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed
from web3 import Web3
from web3.exceptions import (
    ContractCustomError,
    ContractLogicError,
    TransactionNotFound,
    Web3Exception,
    Web3RPCError,
)
from web3.middleware import ExtraDataToPOAMiddleware
from web3.types import RPCEndpoint

from swarmchain.errors import CONTRACT_ERRORS, ChainError, ChainMismatch, ChainUnreachable, NonceTaken
from swarmchain.keys import Signer
from swarmchain.profiles import ProfileName, choose_profile
from swarmchain.protocol import Change, Phase
from swarmchain.rpc import Endpoint, Endpoints

T = TypeVar("T")

RECEIPT_PAUSE_MAX_S = 1.0
SENDS_MAX = 20
ENUMS: dict[str, type[IntEnum]] = {"enum ISwarm.Phase": Phase, "enum ISwarm.Change": Change}
# geth and Anvil, Hardhat, Besu: how nodes say that another transaction of this key has the nonce
NONCE_WORDS = re.compile(
    "nonce too low|nonce has already been used|replacement transaction underpriced|already known|already imported"
    "|known transaction|below current nonce", re.IGNORECASE)


@cache
def load_artifact() -> dict[str, Any]:
    """ABI, creation and runtime bytecode of the contract, as shipped."""
    text = resources.files("swarmchain").joinpath("contract/Swarm.json").read_text(encoding="utf-8")
    artifact: dict[str, Any] = json.loads(text)
    return artifact


@dataclass(frozen=True)
class SignedTransaction:
    """One transaction as it goes out. `digest` is its hash, as hex without 0x."""

    nonce: int
    digest: str
    raw: bytes


class Node:
    """One chain, through one or several nodes.

    Raises
    ------
    ChainUnreachable
        If nothing answers at any of `rpc_urls`.
    """

    def __init__(self, rpc_urls: str | Sequence[str], *, timeout_s: float = 10.0, profile: ProfileName = "auto"
                 ) -> None:
        self.endpoints = Endpoints([rpc_urls] if isinstance(rpc_urls, str) else rpc_urls, timeout_s=timeout_s)
        # none of the usual middleware: it would ask for the chain id before every call, and `require` has seen to that
        self.web3 = Web3(self.endpoints, middleware=[])
        self.profile = choose_profile(profile, self.client_version)
        if self.profile.has_long_extra_data:
            self.web3.middleware_onion.inject(ExtraDataToPOAMiddleware, layer=0)
        self.chain_id = int(self.ask(lambda: self.web3.eth.chain_id))

    @property
    def rpc_url(self) -> str:
        """The node that is asked first now, as it may be shown."""
        return self.endpoints.first.name

    def ask(self, question: Callable[[], T]) -> T:
        """One exchange with the chain; silence becomes `ChainUnreachable`."""
        with translate_errors(self.rpc_url):
            return question()

    def require(self, chain_id: int, address: str, code_sha256: str) -> None:
        """See now, and again whenever a node comes back, that it is on this chain and holds this contract.

        Raises
        ------
        ChainMismatch
            If it is not, or does not.
        """
        def check(ask: Callable[[str, list[Any]], Any]) -> None:
            found = int(ask("eth_chainId", []), 16)
            if found != chain_id:
                raise ChainMismatch(
                    f"the node is on chain {found}, the deployment on {chain_id}",
                    hint="point rpc_urls at nodes of the consortium's chain, or use the right deployment file",
                )
            code = bytes.fromhex(ask("eth_getCode", [address, "latest"]).removeprefix("0x"))
            if hashlib.sha256(code).hexdigest() != code_sha256:
                what = "another code than this version's contract" if code else "no code"
                raise ChainMismatch(
                    f"{what} lies at {address} on chain {chain_id}",
                    hint="check the deployment file; a dev chain forgets everything when it stops",
                )

        self.endpoints.check = check
        for endpoint in self.endpoints.endpoints:
            endpoint.is_checked = False
        self.read_head()

    @property
    def client_version(self) -> str:
        """What the node calls itself, for example `anvil/v1.7.1`."""
        return str(self.ask(lambda: self.web3.client_version))

    def call(self, call: Mapping[str, str], *, block: str = "latest") -> bytes:
        """What a call that changes nothing returns. Raises the exception of a revert."""
        answer = self._ask_plainly("eth_call", call, block)
        return self._read_hex(answer, bytes.fromhex)

    def read_head(self) -> int:
        """Number of the newest block: the cheapest question there is, and a hint whether anything happened."""
        return self._read_hex(self._ask_plainly("eth_blockNumber"), lambda digits: int(digits, 16))

    def _ask_plainly(self, method: str, *about: Any) -> Any:
        """The node's answer as it came: web3 would take longer to dress it than the node to give it."""
        return self.ask(lambda: self.web3.manager.request_blocking(RPCEndpoint(method), list(about)))

    def _read_hex(self, answer: Any, parse: Callable[[str], T]) -> T:
        with translate_errors(self.rpc_url):
            if not isinstance(answer, str) or not answer.startswith("0x"):
                raise ValueError(f"{str(answer)[:40]!r} is no hex number")
            return parse(answer[2:])

    def _read_block(self, block: str) -> dict[str, int]:
        """Numbers of a block that there are and that anyone here reads; empty if there is no such block."""
        found = self._ask_plainly("eth_getBlockByNumber", block, False)
        if not isinstance(found, Mapping):
            return {}
        return {key: self._read_hex(found[key], lambda digits: int(digits, 16))
                for key in ("timestamp", "baseFeePerGas") if found.get(key)}

    def read_time(self) -> int:
        """Timestamp that a transaction sent now would see, at least, in seconds."""
        blocks = ("pending", "latest") if self.profile.trial_block == "pending" else ("latest",)
        for block in blocks:
            try:
                found = self._read_block(block)
            except ChainError:
                continue
            if found.get("timestamp"):
                return found["timestamp"]
        raise ChainError(f"the node at {self.rpc_url} shows no block", hint="is it still starting?")

    def read_block_time(self, block: int) -> int:
        """Timestamp of a block. Raises `ChainError` if the node has no such block."""
        found = self._read_block(hex(block)).get("timestamp")
        if not found:
            raise ChainError(f"the node at {self.rpc_url} has no block {block}", hint="has it forgotten old blocks?")
        return found

    def choose_freshest(self) -> int:
        """Ask first, from now on, the node with the highest block, if any is ahead of the present one by more than one.

        Returns the timestamp of its newest block. A node that lags shows rounds that are long over.
        """
        heads: list[tuple[int, Endpoint]] = []
        for endpoint in list(self.endpoints.endpoints):
            with contextlib.suppress(ChainUnreachable, ChainError):
                heads.append((int(self.endpoints.ask_checked(endpoint, "eth_blockNumber", []), 16), endpoint))
        if heads:
            best, freshest = max(heads, key=lambda pair: pair[0])
            present = next((head for head, endpoint in heads if endpoint is self.endpoints.first), -1)
            if best > present + 1:
                self.endpoints.choose(freshest)
        return self._read_block("latest").get("timestamp", 0)

    def get_nonce(self, address: str, *, block: Literal["latest", "pending"] = "latest") -> int:
        """Transactions of this key that are in a block (or, with `pending`, known to the node)."""
        return int(self.ask(lambda: self.web3.eth.get_transaction_count(address, block)))  # type: ignore[arg-type]

    def sign(self, signer: Signer, call: Mapping[str, Any], *, gas: int, nonce: int, fees: Mapping[str, int]
             ) -> SignedTransaction:
        """Bytes of one transaction, and the hash that it will have."""
        words = {**call, **fees, "chainId": self.chain_id, "gas": gas, "value": 0, "nonce": nonce}
        raw = signer.sign_transaction(words)
        return SignedTransaction(nonce, keccak(raw).hex(), raw)

    def broadcast(self, raw: bytes) -> None:
        """Hand a signed transaction to the chain. Raises `NonceTaken` if it, or another of its nonce, is known."""
        self.ask(lambda: self.web3.eth.send_raw_transaction(raw))

    def get_receipt(self, transaction: str) -> Any | None:
        """The receipt of a transaction (hash as hex), None while it is in no block."""
        try:
            return self.ask(lambda: self.web3.eth.get_transaction_receipt("0x" + transaction))  # type: ignore[arg-type]
        except TransactionNotFound:
            return None

    def knows(self, transaction: str) -> bool:
        """Whether the node has heard of a transaction (hash as hex), in a block or not."""
        try:
            return bool(self.ask(lambda: self.web3.eth.get_transaction("0x" + transaction)))  # type: ignore[arg-type]
        except TransactionNotFound:
            return False

    def await_receipt(self, transaction: str, *, timeout_s: float | None = None) -> Any | None:
        """The receipt once there is one, None after `timeout_s` (by default the profile's)."""
        pause, patience = self.profile.receipt_poll_s, self.profile.receipt_timeout_s
        deadline = time.monotonic() + (patience if timeout_s is None else timeout_s)
        while (receipt := self.get_receipt(transaction)) is None and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, RECEIPT_PAUSE_MAX_S)
        return receipt

    def read_fees(self) -> dict[str, int]:
        """Free where the chain is free (permissioned chains are), else twice the base fee and the suggested tip."""
        if self.profile.is_free:
            return {"gasPrice": 0}
        base = self._read_block("latest").get("baseFeePerGas", 0)
        if not base:
            return {"gasPrice": 0}
        tip = self.ask(lambda: self.web3.eth.max_priority_fee)
        return {"maxFeePerGas": 2 * base + tip, "maxPriorityFeePerGas": tip}

    def send(self, signer: Signer, call: Mapping[str, Any], *, gas: int, purpose: str) -> Any:
        """Sign and send one transaction without a journal, wait for its receipt and return it.

        For whoever has made no promise: deployments and measurements. Sites send through an `Outbox`.
        """
        for attempt in Retrying(retry=retry_if_exception_type(NonceTaken), stop=stop_after_attempt(SENDS_MAX),
                                wait=wait_fixed(0.05), reraise=True):
            with attempt:
                nonce = self.get_nonce(signer.address, block="pending")
                signed = self.sign(signer, call, gas=gas, nonce=nonce, fees=self.read_fees())
                self.broadcast(signed.raw)
        receipt = self.await_receipt(signed.digest)
        if receipt is None:
            raise stalled(purpose, signed.digest)
        return receipt


def stalled(purpose: str, digest: str) -> ChainUnreachable:
    """What is said of a transaction that no block takes in."""
    return ChainUnreachable(
        f"transaction {digest[:12]}… ({purpose}) is in no block yet",
        hint="has the chain stalled? the same bytes are sent again, never others",
    )


@contextlib.contextmanager
def translate_errors(rpc_url: str) -> Iterator[None]:
    """The one seam where web3's errors become ours."""
    try:
        yield
    except TransactionNotFound:  # an answer, and a Web3RPCError by birth
        raise
    except ContractCustomError as exc:
        raise decode_revert(str(exc.data)) from exc
    except ContractLogicError as exc:
        if data := _find_revert_data(exc.data):
            raise decode_revert(data) from exc
        raise ChainError(f"the contract call reverted: {str(exc).splitlines()[0]}") from exc
    except Web3RPCError as exc:
        raise _decode_rpc_error(exc) from exc
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
                if enum := ENUMS.get(item["internalType"]):
                    named[item["name"]] = enum(named[item["name"]]).name
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
