"""The fault grid: every fault in every phase where it can strike. No cell is stuck, no honest site pays for another.

A blob that is spoilt once (`publish`) is put right by its owner; one that its owner spoils (`lasting`) is left out.

`make test` plays the representative cells, SWARMCHAIN_FAULTS=all (`make check-deep`) plays all of them.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from grid import ENVIRONMENT, FAULTY, ROUNDS, Grid, start_grid

from swarmchain.history import NO_CONTRIBUTION, count, read_rounds

# fault: where it can strike
CELLS: dict[str, tuple[str, ...]] = {
    "NONE": ("-",),
    "OFFLINE": ("start", "commit", "vote"),
    "LATE": ("commit", "vote"),
    "CRASH_BEFORE_JOURNAL": ("commit", "vote", "open"),
    "CRASH_AFTER_JOURNAL": ("commit", "vote", "open"),
    "CRASH_AFTER_SEND": ("commit", "publish", "vote", "open"),
    "CRASH_IN_TRAINING": ("commit",),
    "CRASH_IN_MERGE": ("vote",),
    "LIES_IN_OPENING": ("publish",),
    "WITHHOLDS_BLOB": ("publish",),
    "TRUNCATED_BLOB": ("publish", "lasting"),
    "FLIPPED_BIT": ("publish", "lasting"),
    "WRONG_SHAPE": ("commit",),
    "NAN": ("commit",),
    "SCALED_1000": ("commit",),
    "SIGN_FLIP": ("commit",),
    "COPYCAT": ("commit", "publish"),
    "VOTES_FALSE_MERGE": ("vote",),
    "CHAIN_DOWN": ("commit", "vote", "open"),
    "CHAIN_RESTART": ("commit", "vote", "open"),
    "DROPPED_TX": ("commit", "vote", "open"),
    "RPC_TIMEOUT": ("commit", "vote", "open"),
    "STORE_DOWN": ("commit", "vote", "open"),
    "STORE_FULL": ("publish", "vote"),
    "CLOCK_SKEW": ("ahead", "behind"),
}
REPRESENTATIVE = {
    ("NONE", "-"), ("OFFLINE", "commit"), ("LATE", "commit"), ("CRASH_BEFORE_JOURNAL", "vote"),
    ("CRASH_AFTER_JOURNAL", "commit"), ("CRASH_AFTER_SEND", "vote"), ("LIES_IN_OPENING", "publish"),
    ("TRUNCATED_BLOB", "publish"), ("NAN", "commit"), ("COPYCAT", "commit"), ("VOTES_FALSE_MERGE", "vote"),
    ("CHAIN_RESTART", "vote"), ("DROPPED_TX", "commit"), ("STORE_DOWN", "vote"), ("STORE_FULL", "publish"),
}
GRID = [(fault, at) for fault, places in CELLS.items() for at in places
        if os.environ.get("SWARMCHAIN_FAULTS") == "all" or (fault, at) in REPRESENTATIVE]
# why the faulty site is left out of the first round's checkpoint; "" where it is counted
FATE = {
    ("OFFLINE", "start"): NO_CONTRIBUTION, ("OFFLINE", "commit"): "withheld", ("LATE", "commit"): NO_CONTRIBUTION,
    ("LIES_IN_OPENING", "publish"): "opening invalid", ("WITHHOLDS_BLOB", "publish"): "withheld",
    ("TRUNCATED_BLOB", "lasting"): "blob malformed", ("FLIPPED_BIT", "lasting"): "blob altered",
    ("WRONG_SHAPE", "commit"): "blob malformed", ("NAN", "commit"): "not finite",
    ("COPYCAT", "publish"): "opening invalid", ("COPYCAT", "commit"): "opening invalid",
}


def break_world(grid: Grid) -> None:
    {
        "CHAIN_DOWN": lambda: grid.swarm.restart_chain(number=signal.SIGTERM, pause_s=2.0),
        "CHAIN_RESTART": lambda: grid.swarm.restart_chain(number=signal.SIGKILL),
        "DROPPED_TX": grid.drop_transactions,
        "RPC_TIMEOUT": lambda: grid.stop_answering(3.0),
        "STORE_DOWN": grid.unmount_store,
    }[grid.fault]()


@pytest.mark.parametrize(("fault", "at"), GRID, ids=lambda part: str(part))
def test_fault(tmp_path: Path, fault: str, at: str) -> None:
    with start_grid(tmp_path, fault, at) as grid:
        if fault == "STORE_FULL":
            grid.fill_store()
        grid.start()
        if fault == "STORE_FULL":
            wait_until_told(grid, "unreachable")
            grid.free_store()
        grid.play((lambda: break_world(grid)) if fault in ENVIRONMENT - {"STORE_FULL"} else None)

        view = grid.swarm.contract.view_run(grid.run)
        rounds = read_rounds(grid.swarm.contract, grid.swarm.store, grid.run)
        tally = count(rounds)
        assert (tally.finalized, tally.rejected, tally.expired) == (ROUNDS, 0, 0), grid.explain()
        assert [site.process.returncode for site in grid.honest if site.process] == [0] * len(grid.honest)
        held = {site: event["checkpoint"] for site, event in grid.told.events if event["event"] == "ended"}
        assert {held[site.name] for site in grid.honest} == {view.checkpoint}
        assert set(tally.left_out) <= {FAULTY}, tally
        assert rounds[0].explain_absence(FAULTY) == FATE.get((fault, at), ""), grid.explain()
        if fault in ("SCALED_1000",):
            assert rounds[0].manifest is not None
            assert {i.site for i in rounds[0].manifest.included if i.clip_factor < 0.01} == {FAULTY}
        if (fault, at) != ("OFFLINE", "vote"):
            assert rounds[-1].explain_absence(FAULTY) == "", f"{fault} never came back: {grid.explain()}"


def wait_until_told(grid: Grid, kind: str) -> None:
    deadline = time.monotonic() + 60
    while not grid.told.names(kind):
        assert time.monotonic() < deadline, grid.explain()
        grid.listen()
        time.sleep(0.05)
