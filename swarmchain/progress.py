"""A run watched live: a line for each closed round, and on a terminal one more that says what is under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.status import Status

from swarmchain.protocol import Outcome


@dataclass
class RoundSeen:
    """What the agents said about one round: who committed, and each vote's score and checkpoint."""

    committed: list[str] = field(default_factory=list)
    scores: dict[str, float | None] = field(default_factory=dict)
    checkpoints: set[str] = field(default_factory=set)
    is_told: bool = False


class Progress:
    """Takes the agents' events, prints what a person wants to see of them, keeps them all.

    Parameters
    ----------
    get_outcome
        Asks the contract how a round stands.
    """

    def __init__(self, console: Console, *, run: int, rounds: int, sites: int,
                 get_outcome: Callable[[int], Outcome]) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.status: Status | None = None
        self._console = console
        self._run, self._rounds, self._sites = run, rounds, sites
        self._get_outcome = get_outcome
        self._seen: dict[int, RoundSeen] = {}
        self._ended: set[str] = set()
        self._opened = 0

    def show(self, site: str, event: dict[str, Any]) -> None:
        """Take one event of one site."""
        self.events.append((site, event))
        kind = event["event"]
        if kind in ("unreachable", "MISMATCH"):
            self._console.print(f"  {site}: {kind} {event.get('reason', event.get('checkpoint', ''))}", style="red")
        if event.get("run") != self._run:
            return
        if kind == "opened":
            self._opened = max(self._opened, event["round"])
        elif kind == "ended":
            self._ended.add(site)
        elif kind == "committed":
            self._see(event).committed.append(site)
        elif kind == "voted":
            row = self._see(event)
            row.scores[site] = event["score"]
            row.checkpoints.add(event["checkpoint"])
        self._tell_closed()
        self._update()

    def _see(self, event: dict[str, Any]) -> RoundSeen:
        return self._seen.setdefault(event["round"], RoundSeen())

    def _tell_closed(self) -> None:
        """Print the rounds that nothing more is to be heard of, in their order.

        A late vote may still be on its way through the agents' logs when the next round opens, so a round without all
        votes is closed for good only when the one after the next has opened.
        """
        for number in sorted(n for n, row in self._seen.items() if not row.is_told):
            row = self._seen[number]
            over = self._opened >= number + 2 or len(self._ended) == self._sites
            if len(row.scores) < self._sites and not over:
                return
            row.is_told = True
            outcome = self._get_outcome(number).name.lower()
            checkpoint = " ".join(f"{digest[:8]}…" for digest in sorted(row.checkpoints)) or "no checkpoint"
            self._console.print(
                f"  round {number:>3}/{self._rounds}  {outcome} {checkpoint}  {len(row.committed)}/{self._sites} "
                f"committed, {len(row.scores)}/{self._sites} voted  {_format_scores(row.scores)}",
                markup=False,
            )

    def _update(self) -> None:
        if self.status is None or not self._seen:
            return
        number = max(self._seen)
        row = self._seen[number]
        if len(row.committed) < self._sites and not row.scores:
            words = f"COMMIT, {len(row.committed)}/{self._sites} committed: {', '.join(row.committed)}"
        else:
            words = f"VOTE, {len(row.scores)}/{self._sites} voted: {', '.join(row.scores) or 'nobody yet'}"
        self.status.update(f"round {number}/{self._rounds}, phase {words}")


def _format_scores(scores: dict[str, float | None]) -> str:
    return "  ".join(f"{site} {'–' if s is None else format(s, '.2f')}" for site, s in sorted(scores.items()))
