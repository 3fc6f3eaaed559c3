"""Compile the contract with py-solc-x and write what the package ships: `python deploy/compile.py [--check]`.

The compiler is pinned. On a machine with internet access `solcx.install_solc` fetches it; elsewhere the same version
from npm, behind `deploy/solc.js`, does its work. Both produce the same bytes, and `--check` says so without writing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import solcx

ROOT = Path(__file__).resolve().parent.parent
ARTIFACT = ROOT / "swarmchain" / "contract" / "Swarm.json"
SOLC_VERSION = "0.8.30"
# Equal to foundry.toml and hardhat.config.js; a test compares the bytecode of all three.
SETTINGS = {
    "evmVersion": "paris",
    "viaIR": True,
    "optimizer": {"enabled": True, "runs": 200},
    "metadata": {"bytecodeHash": "none", "appendCBOR": False},
}


def find_solc(*, download: bool) -> Path:
    """The compiler's command: npm's package if it is installed, else py-solc-x's download."""
    if not download and (ROOT / "node_modules" / "solc").is_dir():
        return ROOT / "deploy" / "solc.js"
    solcx.install_solc(SOLC_VERSION, show_progress=False)
    return Path(solcx.install.get_executable(SOLC_VERSION))


def read_sources() -> dict[str, str]:
    """The contract's sources by file name, without its tests."""
    return {path.name: path.read_text() for path in sorted((ROOT / "contracts").glob("*.sol"))}


def compile_sources(solc: Path, sources: Mapping[str, str], *, output: Sequence[str], ast: bool = False
                    ) -> dict[str, Any]:
    """The compiler's answer: `output` of the contract, and with `ast` the syntax trees. Raises solcx's `SolcError`."""
    selection: dict[str, Any] = {"Swarm.sol": {"Swarm": list(output)}, **({"*": {"": ["ast"]}} if ast else {})}
    answer: dict[str, Any] = solcx.compile_standard({
        "language": "Solidity", "sources": {name: {"content": text} for name, text in sources.items()},
        "settings": {**SETTINGS, "outputSelection": selection},
    }, solc_binary=solc)
    return answer


def compile_contract(solc: Path) -> dict[str, Any]:
    """ABI, creation bytecode and runtime bytecode (hex without 0x) of Swarm.sol."""
    answer = compile_sources(solc, read_sources(), output=("abi", "evm.bytecode.object", "evm.deployedBytecode.object"))
    contract = answer["contracts"]["Swarm.sol"]["Swarm"]
    return {
        "abi": contract["abi"],
        "bytecode": contract["evm"]["bytecode"]["object"],
        "compiler": SOLC_VERSION,
        "runtime": contract["evm"]["deployedBytecode"]["object"],
    }


def encode_artifact(artifact: dict[str, Any]) -> str:
    """The text of Swarm.json."""
    return json.dumps(artifact, indent=1, sort_keys=True) + "\n"


def main() -> int:
    """Write Swarm.json, or with --check say whether it is what the sources compile to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--download", action="store_true", help="use py-solc-x's own download of the compiler")
    options = parser.parse_args()
    text = encode_artifact(compile_contract(find_solc(download=options.download)))
    if options.check:
        same = ARTIFACT.exists() and ARTIFACT.read_text() == text
        print(f"{ARTIFACT.relative_to(ROOT)} is {'what the sources compile to' if same else 'stale'}")
        return 0 if same else 1
    ARTIFACT.parent.mkdir(parents=True, exist_ok=True)
    ARTIFACT.write_text(text)
    print(f"wrote {ARTIFACT.relative_to(ROOT)}: {len(json.loads(text)['runtime']) // 2} bytes at run time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
