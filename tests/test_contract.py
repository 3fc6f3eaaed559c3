"""The contract as a whole: what it offers, what it costs, how large it is."""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from typing import Any

import pytest
from conftest import ROOT, World, make_signers
from eth_abi.abi import encode as abi_encode
from eth_utils.abi import function_abi_to_4byte_selector
from snapshot import SNAPSHOT, take_snapshot

from swarmchain.errors import NotSite
from swarmchain.node import load_artifact, translate_errors

sys.path.insert(0, str(ROOT / "bench"))
import gas

INTERFACE = (ROOT / "contracts" / "ISwarm.sol").read_text()
ZEROS: dict[str, Any] = {"uint256": 1, "uint8": 0, "bytes32": b"\1" * 32, "address": "0x" + "11" * 20, "bool": True,
                         "tuple": (1, 1, 1, 0)}


def get_functions() -> list[dict[str, Any]]:
    return [entry for entry in load_artifact()["abi"] if entry["type"] == "function"]


def test_functions_are_those_of_the_interface() -> None:
    named = set(re.findall(r"function (\w+)\(", INTERFACE))
    assert {entry["name"] for entry in get_functions()} == named


def test_everything_in_the_interface_is_used() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "contracts").glob("*.sol") if path.name != "ISwarm.sol")
    for kind, word in (("error", "revert"), ("event", "emit")):
        for name in re.findall(rf"{kind} (\w+)\(", INTERFACE):
            assert re.search(rf"{word} {name}\(", sources), f"{kind} {name}"


@pytest.mark.parametrize("name", [f["name"] for f in get_functions() if f["stateMutability"] == "nonpayable"])
def test_outsider_is_refused_by_every_function(world: World, name: str) -> None:
    (entry,) = [f for f in get_functions() if f["name"] == name]
    types = [f"({','.join(c['type'] for c in i['components'])})" if i["type"] == "tuple" else i["type"]
             for i in entry["inputs"]]
    arguments = abi_encode(types, [ZEROS[i["type"]] for i in entry["inputs"]])
    outsider = make_signers(9)[8].address
    web3 = world.contract.node.web3
    with pytest.raises(NotSite, match=outsider), translate_errors(world.contract.node.rpc_url):
        data = function_abi_to_4byte_selector(entry) + arguments
        web3.eth.call({"from": outsider, "to": world.contract.address, "data": data})


def test_errors_say_two_values_at_most() -> None:
    for entry in load_artifact()["abi"]:
        if entry["type"] == "error":
            assert len(entry["inputs"]) <= 2, entry["name"]


def test_source_is_short_and_tested_at_length() -> None:
    """At most 600 lines with its bases, and three of tests for each."""
    lines = {path: len(path.read_text().splitlines()) for path in (ROOT / "contracts").rglob("*.sol")}
    source = sum(n for path, n in lines.items() if path.parent.name == "contracts" and path.name != "ISwarm.sol")
    tests = sum(n for path, n in lines.items() if path.parent.name == "test")
    assert source <= 600
    assert tests >= 3 * source


# -- what it costs


def test_snapshot_is_what_the_contract_is() -> None:
    """If this changed on purpose, `python tests/snapshot.py` writes it anew."""
    assert take_snapshot() == json.loads(SNAPSHOT.read_text())


@cache
def measure(sites: int) -> dict[str, dict[str, Any]]:
    return gas.measure(sites, 0)


def test_budgets_of_gas() -> None:
    """At ten sites, in the first round as in any other; see docs/gas.md."""
    budgets = {"commit": 42_000, "commit_first": 60_000, "vote": 50_000, "vote_first": 86_000, "vote_final": 80_000,
               "open": 75_000, "per_site_round": 90_000}
    for name, row in measure(10).items():
        for column, limit in budgets.items():
            assert row[column] <= limit, f"{name}: {column}"
    assert measure(10)[""]["deploy"] <= 3_500_000
    assert measure(10)[""]["runtime_bytes"] <= 20 * 1024


def assert_like(row: dict[str, Any], other: dict[str, Any]) -> None:
    for column in ("open", "commit_first", "commit", "commit_last", "vote_first", "vote", "vote_final"):
        assert row[column] == pytest.approx(other[column], rel=0.03), column


def test_gas_of_256_sites() -> None:
    assert_like(measure(256)[""], measure(4)[""])


def test_gas_of_a_late_round() -> None:
    """What is kept of a round is two bits: 260 rounds fill more than two words. `bench/gas.py` plays a thousand."""
    assert_like(gas.measure_history(4, 260), measure(4)["second round"])
