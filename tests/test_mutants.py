"""Each attack of contracts/test/Attacks.t.sol is tried on a contract that has the hole: its test must fail there.

And the numbered properties name tests that exist.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import mutation
import pytest
from conftest import ROOT

ATTACKS = ROOT / "contracts" / "test" / "Attacks.t.sol"
MUTANT = re.compile(r"/// mutant (\w+\.sol): `(.*?)` => `(.*?)`$")


def read_attacks() -> dict[str, list[tuple[str, str, str]]]:
    """Per test the changes of our source, (file, old, new), that make its hole."""
    attacks: dict[str, list[tuple[str, str, str]]] = {}
    changes: list[tuple[str, str, str]] = []
    for line in ATTACKS.read_text().splitlines():
        if found := MUTANT.match(line.strip()):
            file, old, new = (part.replace(r"\n", "\n") for part in found.groups())
            changes.append((file, old, new))
        elif name := re.match(r"\s+function (test_attack_\w+)", line):
            attacks[name[1]] = changes
            changes = []
    return attacks


def compile_mutant(changes: list[tuple[str, str, str]]) -> str | None:
    sources = dict(mutation.read_sources())
    for file, old, new in changes:
        assert sources[file].count(old) == 1, f"{file} holds {sources[file].count(old)} × {old!r}"
        sources[file] = sources[file].replace(old, new)
    return mutation.compile_creation_code(sources)


@cache
def compile_mutants() -> dict[str, str | None]:
    attacks = read_attacks()
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(attacks, pool.map(compile_mutant, attacks.values()), strict=True))


@pytest.mark.parametrize("attack", read_attacks())
def test_attack_succeeds_on_a_contract_with_the_hole(attack: str) -> None:
    assert read_attacks()[attack], "no mutant stands beside this attack"
    code = compile_mutants()[attack]
    assert code is not None, "the mutant does not compile"
    passed, output = mutation.run_forge(code, "--match-test", rf"^{attack}\(")
    assert not passed, output
    assert "1 failed" in output


def test_attacks_fail_on_the_contract_itself() -> None:
    code = mutation.compile_creation_code(mutation.read_sources())
    assert code is not None
    passed, output = mutation.run_forge(code, "--match-contract", "AttacksTest")
    assert passed, output


def read_tests() -> set[str]:
    """Names of all tests, in Solidity and Python."""
    names = set()
    for path in (ROOT / "contracts" / "test").glob("*.sol"):
        names |= set(re.findall(r"function ((?:test|testFuzz|invariant|check)_\w+)", path.read_text()))
    for path in (ROOT / "tests").glob("*.py"):
        names |= set(re.findall(r"def (test_\w+)", path.read_text()))
    return names


def test_properties_name_tests_that_exist() -> None:
    text = (ROOT / "contracts" / "PROPERTIES.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 25
    for number, _, tests in rows:
        named = re.findall(r"`(\w+)`", tests)
        assert named, f"property {number} names no test"
        assert set(named) <= read_tests(), f"property {number}: {set(named) - read_tests()}"
