"""One's own network in a swarm, from Python.

    from swarmchain.api import Swarm

    with Swarm("north/site.toml") as swarm:
        for round_ in swarm.rounds(run, model, samples=len(cells)):
            train(model, cells)

Each turn of the loop finds `model` set to the checkpoint that the sites agreed on, and ends with what the training made
of it being committed, disclosed, merged by every site and voted on, through the same contract as any other run. After
the loop `model` is what the sites hold in common. The program may be killed and started again: rounds that it promised
are kept, others are trained for anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from swarmchain.agent import Agent
from swarmchain.config import read_site_config, require_paths
from swarmchain.custom import CustomTask, Score, Settings, TrainingNeeded, plan_custom, require_fit
from swarmchain.errors import KeystoreError, SpecError
from swarmchain.keys import find_password, lock_keystore, open_keystore, open_seal_key
from swarmchain.merging import Codec, Merge
from swarmchain.methods import find_method
from swarmchain.protocol import Terms, derive_seed
from swarmchain.site import Site, open_site, publish_seal_key, seal_store
from swarmchain.spec import CustomSpec, Gate, Limits, encode_spec
from swarmchain.store import Store, open_store, read_checkpoint, read_spec

TERMS = Terms(commit_window_s=3600, vote_window_s=1800, sites_min=2)


@dataclass
class Round:
    """One round to train for.

    `number` counts from 1 to `last`; `seed` differs between rounds and sites, and repeats for the same; `settings` are
    the law's. `samples` may be set where it differs between rounds.
    """

    number: int
    last: int
    seed: int
    settings: Settings
    samples: int


class Swarm:
    """A site at work from a program of its own; a context manager.

    Nothing else may work with the site's key meanwhile: stop its agent first.

    Parameters
    ----------
    site_file
        The site's settings, as `swarmchain site init` wrote them; `[data]` is not needed. The key's password comes from
        `SWARMCHAIN_PASSWORD` or `[keys] password_file`.
    log
        Receives every event of the agent as a dictionary.

    Raises
    ------
    SwarmError
        For what a person has to mend, in one line.
    """

    def __init__(self, site_file: str | Path, *, log: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        self._config = read_site_config(Path(site_file))
        self._log = log
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        require_paths(self._config)
        path = self._config.resolve(self._config.keys.keystore)
        password = find_password(self._config)
        if password is None:
            raise KeystoreError(f"no password for {path}",
                                hint="set SWARMCHAIN_PASSWORD, or [keys] password_file in site.toml")
        with contextlib.ExitStack() as opened:
            opened.enter_context(lock_keystore(path))
            self._site: Site = opened.enter_context(open_site(self._config, open_keystore(path, password)))
            self._store = open_store(self._config)
            named = self._config.keys.seal_key
            self._seal_key = None if named is None else open_seal_key(self._config.resolve(named), password)
            if self._seal_key is not None:
                publish_seal_key(self._site, self._seal_key)
            self._open = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def propose(self, model: nn.Module, *, name: str, rounds: int, sites: int, settings: Settings | None = None,
                local: Sequence[str] = (), code: Path | None = None, merge: Merge | None = None,
                codec: Codec = "float32", gate: Gate | None = None, terms: Terms = TERMS) -> int:
        """Propose a run that starts from `model` as it is, once `sites` have joined; returns its number.

        It binds nobody until they join, this site included. See `custom.plan_custom` for the parameters.
        """
        spec, seed = plan_custom(model, name=name, limits=Limits(rounds=rounds, sites_to_start=sites),
                                 settings=settings, local=local, code=code, merge=merge, codec=codec, gate=gate)
        self._open_sealed(None).put_blob(seed)  # every site must be able to read it before it joins
        return self._site.contract.propose_run(
            self._site.signer, spec=self._store.put_blob(encode_spec(spec)), terms=terms)

    def join(self, run: int, model: nn.Module, *, code: Path | None = None) -> Mapping[str, Any]:
        """Give this site's consent to a run, after checking that `model` (and `code`) are its law's.

        Joining again changes nothing. Returns the settings that all sites train with.
        """
        spec = self._read_law(run, model, code)
        if self._site.index not in self._site.contract.view_run(run).joined:
            self._site.contract.join_run(self._site.signer, run)
        return dict(spec.settings)

    def rounds(self, run: int, model: nn.Module, *, samples: int, score: Score | None = None,
               code: Path | None = None) -> Iterator[Round]:
        """The rounds of a run that this site has joined, each to be trained for in the loop's body.

        Parameters
        ----------
        samples
            Cells or donors that this site trains on; it decides the contribution's weight.
        score
            What the site thinks of a network, from 0 to 1, on cells that it does not train on. It is voted with the
            checkpoint and public on chain; a fall by more than the law's gate rejects it. Without one the site accepts
            every checkpoint that it can recompute.

        Raises
        ------
        SpecError
            If the network or the program are not the law's, or the training left NaN.
        RunFailed, MergeMismatch
            As `agent.Agent.run` does.
        """
        spec = self._read_law(run, model, code)
        if self._site.index not in self._site.contract.view_run(run).joined:
            raise SpecError(f"{self._config.name} has not joined run {run}", hint="call swarm.join(run, model) first")
        task = CustomTask(spec, model, score=score, folder=self._config.work_dir / "training" / str(run))
        agent = Agent(self._site, self._store, log=self._log, seal_key=self._seal_key, tasks={run: task})
        while True:
            try:
                agent.run([run])
                break
            except TrainingNeeded as needed:
                assignment = needed.assignment
            task.load(assignment)
            round_ = Round(assignment.key.round_id, spec.limits.rounds,
                           derive_seed("custom", run, assignment.key.round_id, assignment.site), dict(spec.settings),
                           samples)
            yield round_
            task.give(assignment, round_.samples)
        view = self._site.contract.view_run(run)
        task.load_final(read_checkpoint(self._open_sealed(run), view.checkpoint, spec))

    def _open_sealed(self, run: int | None) -> Store:
        """The store, sealed to a run's members, or to all sites."""
        return seal_store(self._store, self._seal_key, self._site.contract, run)

    def _read_law(self, run: int, model: nn.Module, code: Path | None) -> CustomSpec:
        spec = read_spec(self._store, self._site.contract.view_run(run).spec)
        if not isinstance(spec, CustomSpec):
            raise SpecError(f"run {run} is a {spec.task} run", hint="`swarmchain agent` works on it")
        find_method(spec.merge)
        require_fit(spec, model, code=code)
        return spec
