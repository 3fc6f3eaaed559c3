"""What the contract costs, how large it is and where it keeps what: `python tests/snapshot.py` writes the snapshot.

tests/test_contract.py compares; whoever changes the contract commits the change of contracts/snapshot.json with it, and
a reader sees it in the diff.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import mutation
from conftest import World, make_signers, make_world

from swarmchain.chain import encode_name
from swarmchain.devchain import start_devchain
from swarmchain.node import load_artifact
from swarmchain.protocol import Change, Terms

SNAPSHOT = Path(__file__).resolve().parent.parent / "contracts" / "snapshot.json"
SITES = 4
C1, C2, M1 = "11" * 32, "22" * 32, "33" * 32


def measure_gas() -> dict[str, int]:
    """Gas of every call, from receipts on a fresh Anvil with four sites. The same on every machine."""
    with start_devchain("anvil") as chain:
        world = make_world(chain, SITES)
        found = {"deploy (4 sites)": last_gas(world)}
        found |= measure_membership(world) | measure_runs(world) | measure_rounds(world)
    return found


def last_gas(world: World) -> int:
    return int(world.contract.node.web3.eth.get_block_receipts("latest")[0]["gasUsed"])


def measure_membership(world: World) -> dict[str, int]:
    contract, signers = world.contract, make_signers(SITES + 2)
    new, word = signers[SITES].address, signers[SITES + 1].address[2:].rjust(64, "0")
    found = {"setSealKey (first)": contract.set_seal_key(signers[0], C1),
             "setSealKey": contract.set_seal_key(signers[0], C2)}
    changes = {"admit": (Change.ADMIT, new, encode_name("Fifth").hex()), "rotate key": (Change.ROTATE_KEY, new, word),
               "remove": (Change.REMOVE, signers[SITES + 1].address, "")}
    for name, (kind, subject, data) in changes.items():
        number = contract.propose_change(signers[0], kind, subject=subject, data=data)
        found[f"propose ({name})"] = last_gas(world)
        found[f"approve ({name})"] = contract.approve_change(signers[1], number)
        found[f"approve ({name}, carried out)"] = contract.approve_change(signers[2], number)
    return found


def measure_runs(world: World) -> dict[str, int]:
    contract, signers = world.contract, world.signers
    run = contract.propose_run(signers[0], spec=C1, terms=Terms(1000, 1000, 2))
    found = {"proposeRun": last_gas(world), "joinRun (first)": contract.join_run(signers[0], run),
             "joinRun": [contract.join_run(signer, run) for signer in signers[1:]][-1]}
    found["leaveRun"] = contract.leave_run(signers[3], run)
    found["joinRun (again)"] = contract.join_run(signers[3], run)
    found["announce"] = contract.announce(signers[2], run)
    return found


def measure_rounds(world: World) -> dict[str, int]:
    """Three rounds of the run just made: the first, one that is finalized, one that is rejected."""
    contract, signers, run = world.contract, world.signers, world.contract.get_run_count()
    found: dict[str, int] = {}
    for round_id, name in ((1, " (round 1)"), (2, ""), (3, "")):
        found["openRound" + name] = contract.open_round(signers[0], run)
        commits = [contract.commit(s, run, round_id, f"{round_id:064x}") for s in signers]
        vote = partial(cast, world, (run, round_id))
        if round_id == 3:
            found |= {"vote (rejecting, first)": vote(0, C1, False), "vote (moved)": vote(0, C1, True),
                      "vote (moved again)": vote(0, C2, True), "vote (another ballot)": vote(1, C2, True)}
            found |= {"vote (rejecting)": vote(2, C1, False), "vote (rejecting, decides)": vote(3, C1, False)}
            continue
        found |= {f"commit (first){name}": commits[0], f"commit{name}": commits[2], f"commit (last){name}": commits[3]}
        found |= {f"vote (first){name}": vote(0, C1, True), f"vote{name}": vote(1, C1, True),
                  f"vote (decides){name}": vote(2, C1, True), f"vote (late){name}": vote(3, C1, True)}
    return found


def cast(world: World, key: tuple[int, int], site: int, checkpoint: str, accept: bool) -> int:
    return world.contract.vote(world.signers[site], key, checkpoint, M1, accept=accept, score_bps=9000)


def read_layout() -> list[str]:
    """Every storage variable as `slot +byte bytes name: type`, structs with their fields below."""
    answer = mutation.compile_sources(mutation.read_sources(), output=("storageLayout",))
    layout: dict[str, Any] = answer["contracts"]["Swarm.sol"]["Swarm"]["storageLayout"]
    lines = [format_slot(item, layout["types"]) for item in layout["storage"]]
    for kind in layout["types"].values():
        if "members" in kind:
            lines += [kind["label"], *(f"    {format_slot(item, layout['types'])}" for item in kind["members"])]
    return lines


def format_slot(item: dict[str, Any], types: dict[str, Any]) -> str:
    kind = types[item["type"]]
    return f"{item['slot']} +{item['offset']} {kind['numberOfBytes']} {item['label']}: {kind['label']}"


def take_snapshot() -> dict[str, Any]:
    artifact = load_artifact()
    return {
        "bytes": {"creation": len(artifact["bytecode"]) // 2, "runtime": len(artifact["runtime"]) // 2},
        "gas": measure_gas(), "storage": read_layout(),
    }


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(take_snapshot(), indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {SNAPSHOT.name}")
