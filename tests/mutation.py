"""Mutation testing of the contract: does some test fail when the source says something else?

    python tests/mutation.py [--jobs 2] [--every 3] [--json] [--write]

The compiler's syntax tree of every source (the interface is none) gives the places; each mutant differs in one of
them. A mutant is compiled with the package's settings and handed to the forge tests as bytecode, so these are compiled
once only. It is killed when a test fails, and equal when it compiles to the same bytes. `--write` puts the score and
all survivors into docs/mutants.md; what is known of a survivor stands in JUDGED, and one that is not there is a gap.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from solcx.exceptions import SolcError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "deploy"))
import compile as contract_compiler

ROOT = contract_compiler.ROOT
SWAPS = {
    "==": ["!="], "!=": ["=="], "<": ["<=", ">="], "<=": ["<", ">"], ">": [">=", "<="], ">=": [">", "<"],
    "+": ["-"], "-": ["+"], "*": ["/"], "/": ["*"], "&": ["|"], "|": ["&"], "<<": [">>"], ">>": ["<<"],
    "&&": ["||"], "||": ["&&"], "^": ["&"],
}
ASSIGNMENTS = {"|=": ["=", "&="], "&=": ["=", "|="], "+=": ["="]}
FORGE_LIMITS = {"FOUNDRY_FUZZ_RUNS": "64", "FOUNDRY_INVARIANT_RUNS": "12", "FOUNDRY_INVARIANT_DEPTH": "96"}


@dataclass(frozen=True)
class Mutant:
    """One change of one source: bytes `start` to `end` of `file` become `new`."""

    file: str
    start: int
    end: int
    new: str
    line: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line} {self.text}"


read_sources = cache(contract_compiler.read_sources)


def compile_sources(sources: Mapping[str, str], *, output: tuple[str, ...], ast: bool = False) -> dict[str, Any]:
    """The compiler's answer, with the package's settings. Raises `SolcError` where the sources do not compile."""
    solc = contract_compiler.find_solc(download=False)
    return contract_compiler.compile_sources(solc, sources, output=output, ast=ast)  # type: ignore[no-any-return]


def compile_creation_code(sources: Mapping[str, str]) -> str | None:
    """Creation bytecode as hex, None where the sources do not compile."""
    try:
        answer = compile_sources(sources, output=("evm.bytecode.object",))
    except SolcError:
        return None
    code: str = answer["contracts"]["Swarm.sol"]["Swarm"]["evm"]["bytecode"]["object"]
    return code


@cache
def find_forge() -> str:
    found = sorted((ROOT / "node_modules").glob("@foundry-rs/forge-*/bin/forge"))
    return str(found[0]) if found else "forge"


@cache
def copy_project() -> Path:
    """A copy with the tests compiled, so that whoever edits or builds the project meanwhile disturbs nothing."""
    folder = Path(tempfile.mkdtemp(prefix="swarmchain-mutants-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("contracts", "deploy"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("cache", "out"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)  # forge compiles what has changed since
    shutil.copy(ROOT / "foundry.toml", folder)
    (folder / "node_modules").symlink_to(ROOT / "node_modules")
    subprocess.run([find_forge(), "build"], cwd=folder, capture_output=True, text=True, check=True)
    return folder


def run_forge(code: str, *selection: str) -> tuple[bool, str]:
    """Whether all selected tests pass with this contract, and what forge printed."""
    environment = {**os.environ, **FORGE_LIMITS, "SWARM_CREATION_CODE": "0x" + code}
    done = subprocess.run([find_forge(), "test", "--fail-fast", *selection], cwd=copy_project(), env=environment,
                          capture_output=True, text=True, check=False)
    if "Suite result" not in done.stdout:
        raise RuntimeError(f"forge ran no test: {done.stdout[-500:]} {done.stderr[-500:]}")
    return done.returncode == 0, done.stdout


# -- mutants out of the syntax tree


def walk(node: Any, parents: tuple[dict[str, Any], ...] = ()) -> Iterator[tuple[dict[str, Any], tuple[Any, ...]]]:
    if isinstance(node, dict):
        if "nodeType" in node:
            yield node, parents
            parents = (*parents, node)
        for value in node.values():
            yield from walk(value, parents)
    elif isinstance(node, list):
        for value in node:
            yield from walk(value, parents)


def find_mutants() -> list[Mutant]:
    """Every mutant of every source but the interface, in the order of the sources."""
    sources = read_sources()
    answer = compile_sources(sources, output=("abi",), ast=True)
    found: dict[tuple[str, int, int, str], Mutant] = {}
    for file, entry in answer["sources"].items():
        if file == "ISwarm.sol":
            continue
        data = sources[file].encode()
        for node, parents in walk(entry["ast"]):
            for start, end, new in mutate(node, parents, data):
                old = data[start:end].decode()
                if new == old:
                    continue
                line = data[:start].count(b"\n") + 1
                text = f"`{shorten(old)}` → `{shorten(new)}`"
                found.setdefault((file, start, end, new), Mutant(file, start, end, new, line, text))
    return [found[key] for key in sorted(found)]


def shorten(text: str) -> str:
    return " ".join(text.split())[:70]


def mutate(node: dict[str, Any], parents: tuple[Any, ...], data: bytes) -> Iterator[tuple[int, int, str]]:
    """Replacements for one node, as (start, end, new text)."""
    start, length, _ = (int(part) for part in node["src"].split(":"))
    end = start + length
    inside = any(parent["nodeType"] in ("FunctionDefinition", "VariableDeclaration") for parent in parents)
    operators: dict[str, Callable[[], Iterator[tuple[int, int, str]]]] = {
        "BinaryOperation": lambda: swap(node, data, SWAPS),
        "Assignment": lambda: swap(node, data, ASSIGNMENTS),
        "UnaryOperation": lambda: iter([(start, start + 1, "")] if node["operator"] in "!~" else []),
        "Literal": lambda: change_number(node, start, end),
        "IfStatement": lambda: change_condition(node),
        "Conditional": lambda: iter([(start, end, source_of(node["trueExpression"], data)),
                                     (start, end, source_of(node["falseExpression"], data))]),
        "ExpressionStatement": lambda: iter([(start, end + 1, "{}")]),
        "EmitStatement": lambda: iter([(start, end + 1, "{}")]),
        "RevertStatement": lambda: iter([(start, end + 1, "{}")]),
        "Return": lambda: iter([(start, end + 1, "{}")] if node.get("expression") else []),
    }
    if inside and node["nodeType"] in operators:
        yield from operators[node["nodeType"]]()


def span(node: dict[str, Any]) -> tuple[int, int]:
    start, length, _ = (int(part) for part in node["src"].split(":"))
    return start, start + length


def source_of(node: dict[str, Any], data: bytes) -> str:
    start, end = span(node)
    return data[start:end].decode()


def swap(node: dict[str, Any], data: bytes, table: Mapping[str, list[str]]) -> Iterator[tuple[int, int, str]]:
    left = node.get("leftExpression") or node["leftHandSide"]
    right = node.get("rightExpression") or node["rightHandSide"]
    _, between = span(left)
    until, _ = span(right)
    at = data.find(node["operator"].encode(), between, until)
    for new in table.get(node["operator"], []) if at >= 0 else []:
        yield at, at + len(node["operator"]), new


def change_number(node: dict[str, Any], start: int, end: int) -> Iterator[tuple[int, int, str]]:
    if node["kind"] == "bool":
        yield start, end, "false" if node["value"] == "true" else "true"
    if node["kind"] != "number" or not node["value"].replace("_", "").isdigit() or node.get("subdenomination"):
        return
    value = int(node["value"].replace("_", ""))
    yield start, end, str(value + 1)
    if value > 0:
        yield start, end, str(value - 1)


def change_condition(node: dict[str, Any]) -> Iterator[tuple[int, int, str]]:
    start, end = span(node["condition"])
    yield start, end, "true"
    yield start, end, "false"


# -- judging them


def judge(mutant: Mutant, original: str) -> str:
    """`killed`, `survived`, `equal` (compiles to the same bytes) or `invalid` (does not compile)."""
    sources = dict(read_sources())
    data = sources[mutant.file].encode()
    sources[mutant.file] = (data[: mutant.start] + mutant.new.encode() + data[mutant.end:]).decode()
    code = compile_creation_code(sources)
    if code is None:
        return "invalid"
    if code == original:
        return "equal"
    for selection in ("--no-match-contract", "--match-contract"):
        passed, _ = run_forge(code, selection, "InvariantsTest")
        if not passed:
            return "killed"
    return "survived"


# Survivors that no test can tell from the contract, by file and change, with the reason.
UNREACHED = "differs for values that are never reached: 2^31 rounds, windows of 2^23 s, 2^15 sites"
UNREAD = "changes what an earlier round left in a slot, which nothing reads; costs gas"
JUDGED: dict[str, str] = {
    "Phases.sol `32` → `31`": UNREACHED,
    "Phases.sol `24` → `23`": UNREACHED,
    "Phases.sol `16` → `15`": UNREACHED,
    "Phases.sol `232` → `231`": UNREACHED,
    "Rounds.sol `astray & own != 0` → `true`": UNREAD,
    "Rounds.sol `s.has(VOTED)` → `true`": UNREAD,
    "Rounds.sol `r.astray &= ~Bits.bit(site);` → `{}`": "the bit says more than is read: who has voted is also in"
                                                       " `accepting`, and a vote withdrawn twice is withdrawn once",
    "Runs.sol `1` → `2`": "anything but 0 serves to pay for a slot",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--every", type=int, default=1, help="only one mutant of so many")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="write docs/mutants.md")
    options = parser.parse_args()
    original = compile_creation_code(read_sources())
    assert original is not None
    passed, output = run_forge(original)
    if not passed:
        sys.exit(f"the tests fail without any mutant:\n{output[-2000:]}")
    everything = find_mutants()
    mutants = everything[:: options.every]
    with ThreadPoolExecutor(options.jobs) as pool:
        verdicts = []
        for mutant, verdict in zip(mutants, pool.map(lambda m: judge(m, original), mutants), strict=True):
            verdicts.append(verdict)
            if verdict == "survived":
                print(f"{len(verdicts)} of {len(mutants)}: survived: {mutant.name}", file=sys.stderr, flush=True)
    score = summarize(mutants, verdicts, made=len(everything), every=options.every)
    if options.write:
        (ROOT / "docs" / "mutants.md").write_text(format_page(score))
    print(json.dumps(score, indent=1, ensure_ascii=False) if options.json else format_page(score))
    return 1 if any(not item["judged"] for item in score["survivors"]) else 0


def summarize(mutants: list[Mutant], verdicts: list[str], *, made: int, every: int) -> dict[str, Any]:
    """Counts, the score in percent after judged survivors are taken out, and the survivors with their judgement."""
    counts = {kind: verdicts.count(kind) for kind in ("killed", "survived", "equal", "invalid")}
    survivors = [{"mutant": m.name, "judged": JUDGED.get(f"{m.file} {m.text}", "")}
                 for m, verdict in zip(mutants, verdicts, strict=True) if verdict == "survived"]
    gaps = sum(not item["judged"] for item in survivors)
    tried = counts["killed"] + counts["survived"]
    return {**counts, "made": made, "every": every, "tried": tried,
            "raw_percent": round(100 * counts["killed"] / tried, 1),
            "score_percent": round(100 * counts["killed"] / (counts["killed"] + gaps), 1), "survivors": survivors}


def format_page(score: dict[str, Any]) -> str:
    rows = "".join(f"| {item['mutant'].replace('|', chr(92) + '|')} | {item['judged'] or 'a gap'} |\n"
                   for item in score["survivors"])
    return f"""# Mutants of the contract

Written by `make mutants`. The syntax tree of the sources gives {score["made"]} single changes (operators,
constants, conditions, statements); one in {score["every"]} was tried. Of those, {score["invalid"]} do not compile, and
as many as {score["equal"]} compile to the same bytes. Of the other {score["tried"]}, the forge tests kill
{score["killed"]}: {score["raw_percent"]} %. Without the survivors below that
nothing could tell from the contract, the score is **{score["score_percent"]} %**.

| survivor | judged |
|---|---|
{rows}"""


if __name__ == "__main__":
    sys.exit(main())
