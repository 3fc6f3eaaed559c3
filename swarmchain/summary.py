"""summary.json: what a run was, read back from the chain, the store and the agents' own words."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from swarmchain.chain import SwarmContract
from swarmchain.history import read_rounds
from swarmchain.protocol import BPS
from swarmchain.store import Store

CALLS = {"openRound": "RoundOpened", "commit": "Committed", "vote": "Voted", "joinRun": "RunJoined",
         "proposeRun": "RunProposed"}


def build_rounds(contract: SwarmContract, store: Store, run: int, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """One dictionary for each round, from the contract's events and the manifests."""
    rows = []
    for record in read_rounds(contract, store, run):
        manifest = record.manifest
        rows.append({
            "round_id": record.round_id, "outcome": record.outcome.name.lower(),
            "checkpoint": record.checkpoint or None, "manifest": record.manifest_digest or None,
            "committed": sorted(names[i] for i in record.committed), "voted": sorted(names[i] for i in record.scores),
            "included": [
                {"site": names[i.site], "samples": i.samples, "norm": i.norm, "clip_factor": i.clip_factor,
                 "weight": i.weight} for i in (manifest.included if manifest else ())
            ],
            "excluded": [{"site": names[e.site], "reason": e.reason} for e in (manifest.excluded if manifest else ())]
            + [{"site": names[i.site], "reason": i.doubt} for i in (manifest.included if manifest else ()) if i.doubt],
            "scores": {names[i]: score / BPS for i, score in record.scores.items()}, "test_macro_f1": None,
        })
    return rows


def measure_gas(contract: SwarmContract, run: int, names: Mapping[int, str]) -> dict[str, Any]:
    """Gas of every call of a run, from the receipts: per call, and per site and round."""
    calls: dict[str, dict[str, int]] = {}
    by_site = dict.fromkeys(names.values(), 0)
    rounds = 0
    for call, event_name in CALLS.items():
        for event in contract.get_events([event_name], run=run):
            used = contract.get_gas(event.transaction)
            calls.setdefault(call, {})[event.transaction] = used
            rounds = max(rounds, int(event.values.get("round", 0)))
            if call in ("openRound", "commit", "vote"):
                by_site[names[event.values["opener" if call == "openRound" else "site"]]] += used
    return {
        **{call: {"median": int(statistics.median(used.values())), "max": max(used.values()), "count": len(used)}
           for call, used in sorted(calls.items())},
        "per_site_round": {name: used / max(rounds, 1) for name, used in by_site.items()},
    }


def summarize_timing(events: Sequence[tuple[str, Mapping[str, Any]]], run: int, *, total: float, setup: float
                     ) -> dict[str, Any]:
    """`timing_s` of summary.json, from the agents' `voted` events: per round the mean of the sites, and each site."""
    rounds: dict[int, dict[str, Any]] = {}
    for site, event in events:
        if event["event"] == "voted" and event["run"] == run:
            rounds.setdefault(event["round"], {})[site] = event["timing_s"]
    return {"total": round(total, 2), "setup": round(setup, 2),
            "rounds": [{"round_id": n, **_average(list(sites.values())), "sites": dict(sorted(sites.items()))}
                       for n, sites in sorted(rounds.items())]}


def _average(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {kind: round(statistics.fmean(row[kind] for row in rows), 4) for kind in rows[0]}


def to_json(summary: Mapping[str, Any]) -> bytes:
    """The bytes of summary.json."""
    return json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
