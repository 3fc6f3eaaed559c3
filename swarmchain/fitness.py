"""Whether this machine and this site's data are up to a run: room on disk and in memory, the spec, a round's time.

Measures where that is possible: one step of training is trained.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from swarmchain.checkpoint import compute_size
from swarmchain.config import SiteConfig
from swarmchain.describe import describe_duration
from swarmchain.errors import ConfigError
from swarmchain.layouts import checkpoint_layout, contribution_layout
from swarmchain.protocol import RunView
from swarmchain.spec import Spec
from swarmchain.store import Store
from swarmchain.tasks import MeasuresSteps
from swarmchain.work import RunWork

# the share of a window beyond which training is called tight
TIGHT = 0.5

Status = Literal["ok", "failed", "warning", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, and what to do about it where it is not well."""

    check: str
    status: Status
    words: str
    remedy: str = ""
    is_unreachable: bool = False


def find_free_disk(folder: Path) -> int:
    """Bytes free where a folder is or will be. Raises `ConfigError` if this account may not write there."""
    try:
        place = next(p for p in (folder, *folder.parents) if p.exists())
        if not os.access(place, os.W_OK):
            raise ConfigError(f"[agent] work_dir: {place} is not writable", hint="give it to the agent's user")
        return shutil.disk_usage(place).free
    except OSError as exc:
        raise ConfigError(f"[agent] work_dir: cannot use {folder}: {exc.strerror}", hint="name another one") from exc


def read_free_memory() -> int | None:
    """Bytes that a process may still take, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def describe_size(count: float) -> str:
    """Bytes as a person says them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@dataclass(frozen=True)
class Desk:
    """Of whom a run asks something: the site's settings, its index, the store, and how to look at any run."""

    config: SiteConfig
    site: int
    store: Store
    view_run: Callable[[int], RunView]


def examine_run(desk: Desk, view: RunView, spec: Spec) -> Iterator[Finding]:
    """One run: what it needs of the machine, and whether the data satisfy it and training makes the window.

    Raises
    ------
    SwarmError
        If the data do not satisfy the spec.
    """
    name = f"run {view.run}"
    model, contribution = compute_size(checkpoint_layout(spec)), compute_size(contribution_layout(spec))
    sites = max(len(view.joined | {desk.site}), spec.limits.sites_to_start)
    yield _examine_room(f"{name} disk", find_free_disk(desk.config.work_dir), sites * contribution + 3 * model,
                        f"{sites} contributions and its own", "free space, or name another [agent] work_dir")
    memory = _examine_room(f"{name} memory", read_free_memory(), 2 * model + contribution,
                           "two models and a contribution", "end other programs, or use a machine with more")
    yield memory
    if memory.status == "failed":
        yield Finding(name, "skipped", "not looked at: memory comes first")
        return
    work = RunWork(desk.config, desk.store, view, site=desk.site, view_run=desk.view_run)
    counts = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in work.task.describe().items())
    joined = "joined" if desk.site in view.joined else "not joined yet"
    yield Finding(name, "ok", f"{spec.task} “{spec.name}”: the data satisfy its spec ({counts}); {joined}")
    yield _examine_time(f"{name} time", work, view)


def _examine_room(check: str, free: int | None, needed: int, what: str, remedy: str) -> Finding:
    if free is None:
        return Finding(check, "warning", f"{describe_size(needed)} are needed for {what}; what is free is not known")
    words = f"{describe_size(needed)} are needed for {what}, {describe_size(free)} are free"
    return Finding(check, "failed", words, remedy) if free < needed else Finding(check, "ok", words)


def _examine_time(check: str, work: RunWork, view: RunView) -> Finding:
    """One step of training, measured, times the steps of a round, against the commit window."""
    if not isinstance(work.task, MeasuresSteps):
        return Finding(check, "ok", "nothing is trained step by step")
    step_s, steps = work.task.measure_step(work.read_parent(view)[1]), work.task.steps
    needs_s, window_s = step_s * steps, view.terms.commit_window_s
    words = (f"{1000 * step_s:.1f} ms a step, {steps} steps: {describe_duration(needs_s)} of the "
             f"{describe_duration(window_s)} that a round waits")
    if needs_s > window_s:
        return Finding(check, "failed", words, "more [agent] threads, a faster machine, or a run with a longer window")
    return Finding(check, "warning" if needs_s > TIGHT * window_s else "ok", words,
                   "close: other work on this machine may cost rounds" if needs_s > TIGHT * window_s else "")
