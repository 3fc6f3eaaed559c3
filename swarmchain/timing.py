"""Where an agent's time goes, and how long it waits before it looks again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

KINDS = ("train", "chain", "store", "merge")


@dataclass
class Clock:
    """Seconds spent per kind of work in one round; `wait` is what is left of the round's duration."""

    now: Callable[[], float] = time.monotonic
    spent: dict[str, float] = field(default_factory=dict)
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.now()

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Add what happens inside to `kind`."""
        start = self.now()
        try:
            yield
        finally:
            self.spent[kind] = self.spent.get(kind, 0.0) + self.now() - start

    def summarize(self) -> dict[str, float]:
        """Seconds of train, chain, store, merge and wait, rounded to milliseconds."""
        kinds = {kind: self.spent.get(kind, 0.0) for kind in KINDS}
        kinds["wait"] = max(0.0, self.now() - self.started - sum(kinds.values()))
        return {kind: round(value, 3) for kind, value in kinds.items()}


@dataclass
class Patience:
    """Pauses that grow by half from `shortest_s` to `longest_s`: quick while things move, cheap while they do not."""

    shortest_s: float
    longest_s: float
    _next_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._next_s = min(self.shortest_s, self.longest_s)

    def grow(self) -> float:
        """The pause to make now, in seconds; the next one will be longer."""
        pause = self._next_s
        self._next_s = min(1.5 * pause, self.longest_s)
        return pause

    def reset(self) -> None:
        """Be quick again."""
        self.__post_init__()


def sleep(seconds: float, *, stopping: Callable[[], bool] = lambda: False) -> None:
    """Sleep, but not on after a signal to stop."""
    deadline = time.monotonic() + seconds
    while not stopping() and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 0.25))
