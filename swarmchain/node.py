"""One Ethereum node: questions, transactions, and every foreign error translated at this one seam.

A revert becomes the exception of its name, a silent node becomes `ChainUnreachable`. What the chain's time is, the node
says: the pending block's timestamp, or the latest one's where no block is pending. Beside `chain`, the only room that
knows web3.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
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

from swarmchain.errors import CONTRACT_ERRORS, ChainError, ChainUnreachable, ConfigError, NonceTaken
from swarmchain.keys import Signer
from swarmchain.protocol import Change, Phase

T = TypeVar("T")

RECEIPT_TIMEOUT_S = 60.0
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
