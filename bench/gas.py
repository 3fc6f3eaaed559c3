"""What each call costs in gas, from receipts on Anvil: whole rounds through the contract, per number of sites.

    python bench/gas.py [--sites 4 10 64 256] [--rounds 4] [--at-round 1000] [--json] [--write]

A round is one `openRound`, a `commit` and an accepting `vote` of every site; the votes after the decision are counted
too. `commit_first` and `vote_first` are the first of a round; `commit_last` is the one that ends the Commit phase, or
makes the commitments enough; `vote_final` is the one that decides; `commit` and `vote` are the median of all others;
`per_site_round` is everything divided by the sites. The first two rounds of a run stand in rows of their own.
`--at-round` adds a row at the end of a long history. `--write` puts the table into docs/gas.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from eth_account import Account

from swarmchain.chain import SwarmContract, deploy_contract, encode_call
from swarmchain.devchain import start_devchain
from swarmchain.keys import Signer
from swarmchain.node import Node, load_artifact
from swarmchain.protocol import Terms

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("open", "commit_first", "commit", "commit_last", "vote_first", "vote", "vote_final", "per_site_round")
MARKS = ("<!-- table -->\n", "<!-- end of table -->\n")


class Round:
    """Gas of every call of one round, in their order."""

    def __init__(self, contract: SwarmContract, signers: list[Signer], run: int, round_id: int) -> None:
        digests = [bytes([round_id % 251 + 1, kind]) * 16 for kind in (1, 2)]
        checkpoint, manifest = (digest.hex() for digest in digests)
        self.open = contract.open_round(signers[round_id % len(signers)], run)
        self.commits = [contract.commit(s, run, round_id, checkpoint) for s in signers]
        self.votes = [contract.vote(s, (run, round_id), checkpoint, manifest, accept=True, score_bps=9000)
                      for s in signers]


def summarize(rounds: list[Round], sites: int) -> dict[str, Any]:
    final = sites // 2  # index of the vote that completes the majority
    median = statistics.median
    others = [gas for r in rounds for i, gas in enumerate(r.votes) if i not in (0, final)]
    moving = {1, sites - 1}  # these commitments move the state: enough of them, all of them
    return {
        "open": median(r.open for r in rounds),
        "commit_first": median(r.commits[0] for r in rounds),
        "commit": median(gas for r in rounds for i, gas in enumerate(r.commits) if i not in {0, *moving}),
        "commit_last": median(gas for r in rounds for i, gas in enumerate(r.commits) if i in moving),
        "vote_first": median(r.votes[0] for r in rounds),
        "vote": median(others), "vote_final": median(r.votes[final] for r in rounds),
        "per_site_round": round(median((r.open + sum(r.commits) + sum(r.votes)) / sites for r in rounds)),
        "commit_max": max(gas for r in rounds for gas in r.commits),
        "vote_max": max(gas for r in rounds for gas in r.votes), "open_max": max(r.open for r in rounds),
    }


def make_signers(count: int) -> list[Signer]:
    return [Signer(Account.from_key((i + 1).to_bytes(32, "big"))) for i in range(count)]


def start_run(rpc_url: str, sites: int) -> tuple[SwarmContract, list[Signer], int, int]:
    """A consortium whose sites have all joined one run; its contract, keys, run, and the gas of the deployment."""
    node, signers = Node(rpc_url), make_signers(sites)
    deployment = deploy_contract(node, signers[0], [(s.address, f"Site {i}") for i, s in enumerate(signers)])
    receipt = node.web3.eth.get_block_receipts(deployment.block)[0]
    deployed = int(receipt["gasUsed"])
    contract = SwarmContract(node, deployment)
    run = contract.propose_run(signers[0], spec="ab" * 32, terms=Terms(7_000_000, 7_000_000, 2))
    for signer in signers:
        contract.join_run(signer, run)
    return contract, signers, run, deployed


def measure(sites: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Rows for the first, the second, and ("") the `rounds` rounds after them, or the second again if none are."""
    with start_devchain("anvil") as chain:
        contract, signers, run, deployed = start_run(chain.rpc_url, sites)
        found = [Round(contract, signers, run, n) for n in range(1, rounds + 3)]
    runtime = {"runtime_bytes": len(load_artifact()["runtime"]) // 2, "deploy": deployed}
    rows = {"first round": summarize(found[:1], sites), "second round": summarize(found[1:2], sites)}
    return {**rows, "": {**(summarize(found[2:], sites) if rounds else rows["second round"]), **runtime}}


def measure_history(sites: int, at_round: int) -> dict[str, Any]:
    """One round after `at_round` - 1 others."""
    with start_devchain("anvil") as chain:
        contract, signers, run, _ = start_run(chain.rpc_url, sites)
        play_rounds(contract, signers, run, at_round - 1)
        if contract.view_run(run).finalized_round != at_round - 1:
            sys.exit("the rounds before did not go as they should")
        return summarize([Round(contract, signers, run, at_round)], sites)


def play_rounds(contract: SwarmContract, signers: list[Signer], run: int, rounds: int) -> None:
    """Finalize round after round, waiting once for all transactions of a phase."""
    web3 = contract.node.web3
    nonces = {signer.address: web3.eth.get_transaction_count(signer.address) for signer in signers}  # type: ignore[arg-type]

    def send(signer: Signer, name: str, *arguments: Any) -> Any:
        data = encode_call(name, arguments)
        raw = signer.sign_transaction({
            "to": contract.address, "data": data, "chainId": contract.chain_id, "gas": 300_000, "gasPrice": 0,
            "value": 0, "nonce": nonces[signer.address]})
        nonces[signer.address] += 1
        return web3.eth.send_raw_transaction(raw)

    def wait(transactions: list[Any]) -> None:
        for transaction in transactions:
            if web3.eth.wait_for_transaction_receipt(transaction, poll_latency=0.005)["status"] != 1:
                sys.exit("a transaction of an earlier round failed")

    for round_id in range(1, rounds + 1):
        word = round_id.to_bytes(32, "big")
        wait([send(signers[0], "openRound", run)])
        wait([send(signer, "commit", run, round_id, word) for signer in signers])
        wait([send(s, "vote", run, round_id, word, word, True, 1) for s in signers[: len(signers) // 2 + 1]])


def format_table(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| sites | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    lines += [f"| {name} | " + " | ".join(f"{row[column]:,.0f}" for column in COLUMNS) + " |"
              for name, row in found.items()]
    deployed = ", ".join(f"{row['deploy']:,} with {name}" for name, row in found.items() if "deploy" in row)
    size = next(row["runtime_bytes"] for row in found.values() if "deploy" in row)
    return "\n".join(lines) + f"\n\nDeployment: {deployed} sites. Code at run time: {size:,} bytes.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 10, 64, 256])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--at-round", type=int, default=1000, help="0 leaves the row out")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the table into docs/gas.md")
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for sites in options.sites:
        rows = measure(sites, options.rounds)
        if sites == 10:
            found |= {"10, first round": rows["first round"], "10, second round": rows["second round"]}
        found[str(sites)] = rows[""]
    if options.at_round:
        found[f"4, round {options.at_round}"] = measure_history(4, options.at_round)
    if options.json:
        json.dump(found, sys.stdout, indent=1)
        return
    table = format_table(found)
    print(table)
    if options.write:
        page = ROOT / "docs" / "gas.md"
        before, _, rest = page.read_text().partition(MARKS[0])
        page.write_text(before + MARKS[0] + table + MARKS[1] + rest.partition(MARKS[1])[2])


if __name__ == "__main__":
    main()
