"""Where a benchmark's swarm is played: in this process, or by agents as processes on a chain of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from swarmchain.config import DataConfig, SiteCard
from swarmchain.consortium import Consortium, start_consortium
from swarmchain.duties import is_over
from swarmchain.errors import RunFailed
from swarmchain.inprocess import InProcess
from swarmchain.protocol import RunView
from swarmchain.spec import Spec
from swarmchain.store import Store

Scores = dict[str, float | None]


class Arena(Protocol):
    """Sites with cells that play run after run."""

    store: Store

    def list_cards(self) -> list[SiteCard]:
        """Names of features and labels of every site."""
        ...

    def play(self, spec: Spec, seed_checkpoint: bytes = b"") -> tuple[RunView, Scores]:
        """A run from proposal to end; each site's last score. Raises `RunFailed` if it has no checkpoint."""
        ...


@contextmanager
def open_arena(folder: Path, cells: Mapping[str, DataConfig], *, is_real: bool, seed: int) -> Iterator[Arena]:
    """Sites with the cells that these settings name, all of the same columns, label map and state.

    Parameters
    ----------
    is_real
        Agents as processes, on an Anvil that is started for them and ended with the context.
    seed
        Draws the real sites' keys.
    """
    if not is_real:
        yield _InProcess(InProcess(folder, cells))
        return
    one = next(iter(cells.values()))
    files = {name: Path(settings.path) for name, settings in cells.items()}
    with start_consortium(folder, files, seed=seed, label_column=one.label_column, label_map=one.label_map,
                          state=one.state, donor_column=one.donor_column, sample_column=one.sample_column,
                          classes_min=one.classes_min) as consortium:
        yield _Agents(consortium)


class _InProcess:
    def __init__(self, room: InProcess) -> None:
        self.store = room.store
        self._room = room

    def list_cards(self) -> list[SiteCard]:
        return self._room.list_cards()

    def play(self, spec: Spec, seed_checkpoint: bytes = b"") -> tuple[RunView, Scores]:
        played = self._room.play(self._room.propose(spec, seed_checkpoint=seed_checkpoint))
        return played.view, played.rounds[-1].scores


class _Agents:
    """Agents are started for two runs at once, since most of a short run's time is the start of Python."""

    def __init__(self, consortium: Consortium) -> None:
        self.store = consortium.store
        self._consortium = consortium
        self._awaited = 0

    def list_cards(self) -> list[SiteCard]:
        return [site.card for site in self._consortium.sites]

    def play(self, spec: Spec, seed_checkpoint: bytes = b"") -> tuple[RunView, Scores]:
        if seed_checkpoint:
            self.store.put_blob(seed_checkpoint)
        consortium = self._consortium
        scores: Scores = {}
        contract = consortium.contract

        def note(site: str, event: dict[str, Any]) -> None:
            if event["event"] == "voted" and event["run"] == run:
                scores[site] = event["score"]

        run = consortium.propose(spec)
        if self._awaited == run:
            consortium.follow(note)
        else:
            consortium.stop_agents()
            consortium.start_agents([run, run + 1])
            self._awaited = run + 1
            consortium.follow(note, until=lambda: is_over(contract.view_run(run), spec.limits))
        view = contract.view_run(run)
        if not view.finalized_round:
            raise RunFailed(f"run {run} of {spec.name!r} ended without a checkpoint",
                            hint=f"what the agents said is in {consortium.folder}")
        return view, scores
