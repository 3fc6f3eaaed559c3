"""All that one site does for one run: prepare its cells, contribute, certify, judge.

Knows the run's tensors and the site's cells, and neither keys nor transactions: those are the agent's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy.typing as npt

from swarmchain.certify import NO_PARENT, Arrays, Certified, Gathered, certify, gather_many
from swarmchain.checkpoint import compute_size, decode_tensors, encode_tensors
from swarmchain.codec import encode_deltas
from swarmchain.config import SiteConfig, write_file
from swarmchain.errors import CheckpointError, SpecError, StoreError, StoreUnreachable, SwarmError
from swarmchain.keeper import Keeper
from swarmchain.layouts import contribution_layout, local_layout, parameter_layout
from swarmchain.methods import find_method
from swarmchain.names import NAMES_BYTES_MAX
from swarmchain.protocol import Excluded, Included, Manifest, Rating, Reason, RoundKey, RunView
from swarmchain.spec import (
    CellSpec,
    CustomSpec,
    DonorSpec,
    EvaluationSpec,
    RehearsalSpec,
    RunRef,
    Spec,
    StatisticsSpec,
    SumSpec,
    TrainedSpec,
)
from swarmchain.spool import Spool
from swarmchain.store import Store, read_checkpoint, read_manifest, read_spec
from swarmchain.tasks import (
    Assignment,
    CellTypeTask,
    DonorTask,
    EvaluationTask,
    Past,
    RehearsalTask,
    StatisticsTask,
    Task,
    start_parent,
)
from swarmchain.trust import Claim

MANIFESTS_KEPT = 4


class RunWork:
    """All that one site does for one run, over the tensors and cells of that run.

    Contributions of others that were found good are kept until the round is over, so that each is fetched and hashed
    once, as it arrives. What coding lost of this site's own contributions is kept for the next ones.

    Parameters
    ----------
    view_run
        Asks the contract for any run, to see that the statistics that a spec names are those on record.
    task
        What computes for a run whose network is the site's own.

    Raises
    ------
    SpecError, DataError
        If the spec stands on other statistics, or the site's data cannot satisfy it.
    """

    def __init__(self, config: SiteConfig, store: Store, view: RunView, *, site: int,
                 view_run: Callable[[int], RunView], task: Task | None = None) -> None:
        self.store = store
        self.site = site
        self.spec_digest = view.spec
        self.spec = read_spec(store, view.spec)
        self._layout = contribution_layout(self.spec)
        self._folder = config.work_dir / "training" / str(view.run)
        self._spool = Spool(config.work_dir / "spool")
        self._parent: tuple[str, Arrays] = ("", {})
        self._made: tuple[str, Arrays] = ("", {})
        self._manifests: dict[str, Manifest] = {}
        self._round: RoundKey | None = None
        self._good: dict[int, Gathered] = {}
        self.task = task or self._prepare(self._fetch_names(config), view_run)

    def _fetch_names(self, config: SiteConfig) -> SiteConfig:
        """Settings that name the run's table of feature names, from the store, unless the site names one itself."""
        pinned = None if not isinstance(self.spec, CellSpec) else self.spec.panel.names
        if pinned is None or config.data is None or config.data.feature_table is not None:
            return config
        path = config.work_dir / "names" / f"{pinned}.csv"
        write_file(path, self.store.get_blob(pinned, bytes_max=NAMES_BYTES_MAX))
        return config.model_copy(update={"data": config.data.model_copy(update={"feature_table": str(path)})})

    def _prepare(self, config: SiteConfig, view_run: Callable[[int], RunView]) -> Task:
        if not isinstance(self.spec, SumSpec):
            find_method(self.spec.merge)
        if isinstance(self.spec, CustomSpec):
            raise SpecError(f"“{self.spec.name}” trains a network of the sites' own",
                            hint="work on it from the program that trains it: swarmchain.api, docs/custom.md")
        if isinstance(self.spec, RehearsalSpec):
            return RehearsalTask(self.spec)
        if isinstance(self.spec, StatisticsSpec):
            return StatisticsTask(config, self.spec)
        if isinstance(self.spec, EvaluationSpec):
            trained = load_trained(self.store, self.spec, view_run)
            own = read_own(config, self.spec.trained.run, trained[0])
            return EvaluationTask(config, self.spec, trained, own=own)
        check_statistics(self.spec, view_run(self.spec.statistics.run))
        source = load_statistics_source(self.store, self.spec)
        statistics = read_checkpoint(self.store, self.spec.statistics.checkpoint, source)
        seed = read_checkpoint(self.store, self.spec.seed_checkpoint, self.spec)
        make = DonorTask if isinstance(self.spec, DonorSpec) else CellTypeTask
        return make(config, self.spec, (source, statistics), seed, folder=self._folder)

    def read_parent(self, view: RunView) -> tuple[str, Arrays]:
        """Digest and tensors of the checkpoint that the newest round starts from.

        A finalized newest round has replaced its own parent on chain; then the manifest names it.
        """
        if isinstance(self.spec, SumSpec):
            return NO_PARENT, {}
        if view.finalized_round == view.round_id and view.round_id > 0:
            digest = read_manifest(self.store, view.manifest).parent
        elif view.finalized_round:
            digest = view.checkpoint
        else:
            digest = NO_PARENT if isinstance(self.spec, RehearsalSpec) else self.spec.seed_checkpoint
        if self._made[0] == digest:
            self._parent, self._made = self._made, ("", {})
        elif self._parent[0] != digest:
            self._parent = (digest, self._read_checkpoint(digest))
        return self._parent

    def _read_checkpoint(self, digest: str) -> Arrays:
        if isinstance(self.spec, RehearsalSpec) and digest == NO_PARENT:
            return start_parent(self.spec)
        return read_checkpoint(self.store, digest, self.spec)

    def read_previous(self, view: RunView) -> tuple[str, Manifest | None]:
        """Digest and content of the manifest that the newest round builds on: the last one finalized before it."""
        digest = view.manifest if view.finalized_round else NO_PARENT
        if view.finalized_round == view.round_id and view.round_id > 0:
            digest = self._read_manifest(digest).previous
        return digest, None if digest == NO_PARENT else self._read_manifest(digest)

    def _read_manifest(self, digest: str) -> Manifest:
        if digest not in self._manifests:
            self._manifests[digest] = read_manifest(self.store, digest)
            for old in list(self._manifests)[:-MANIFESTS_KEPT]:
                del self._manifests[old]
        return self._manifests[digest]

    def rate(self, view: RunView) -> tuple[Rating, ...]:
        """What the last finalized round's contributions do to this site's validation cells; see `rating`.

        A contribution that is no longer in the store is not rated.
        """
        previous = self.read_previous(view)[1]
        if previous is None or isinstance(self.spec, SumSpec) or self.spec.merge.trust is None:
            return ()

        def read_past_parent() -> Arrays:
            is_held = self._parent[0] == previous.parent
            return self._parent[1] if is_held else self._read_checkpoint(previous.parent)

        return self.task.rate(Past(previous.round, read_past_parent, lambda: self._read_others(previous.included)))

    def _read_others(self, included: tuple[Included, ...]) -> Iterator[Claim]:
        """Every contribution but this site's own, as far as the store still holds it."""
        for item in included:
            if item.site == self.site:
                continue
            held = self._good.get(item.site)
            if held is not None and held.commitment == item.commitment:
                yield Claim(item.site, item.clip_factor, item.labels, held.contribution.tensors)
                continue
            data = self._spool.get_slot(item.site, compute_size(self._layout))
            self._good.pop(item.site, None)  # it lies in the same slot
            try:
                self.store.read_blob(item.digest, data)
                yield Claim(item.site, item.clip_factor, item.labels, decode_tensors(data, self._layout))
            except StoreUnreachable:
                raise
            except (StoreError, CheckpointError):
                continue

    def contribute(self, view: RunView, key: RoundKey) -> tuple[bytes, int, dict[str, float]]:
        """Bytes of this site's contribution, its number of training cells, and remarks."""
        assignment = Assignment(key, self.site, self.read_parent(view), self._folder, view.finalized_round)
        tensors, samples, metrics = self.task.contribute(assignment)
        if not isinstance(self.spec, SumSpec) and self.spec.codec != "float32":
            kept = Keeper(self._folder, "residual", parameter_layout(self.spec))
            tensors, lost = encode_deltas(tensors, self.spec.codec, residual=kept.read(assignment.after))
            kept.write(key.round_id, lost)
        return encode_tensors(tensors, self._layout), samples, metrics

    def check(self, view: RunView, key: RoundKey, sites: Sequence[int]) -> dict[int, Reason | None]:
        """Fetch what committed sites disclosed: of each None if it is good, else what is wrong with it by now."""
        self._enter(key)
        good = {site: held for site in sites
                if (held := self._good.pop(site, None)) is not None and held.commitment == view.commitments[site]}
        self._good |= good
        found = gather_many(self.store, self._spool, {s: view.commitments[s] for s in sites if s not in good},
                            self._layout, key=key)
        self._good |= {site: answer for site, answer in found.items() if isinstance(answer, Gathered)}
        return {site: None if isinstance(answer := found.get(site), Gathered) else answer for site in sites}

    def certify(self, view: RunView, key: RoundKey, *, only: frozenset[int] | None = None) -> Certified | None:
        """Recompute the round's merge from what lies in the store; None if nothing usable does.

        Parameters
        ----------
        only
            Count these sites alone: to recompute a manifest that others agreed on.
        """
        sites = sorted(view.committed if only is None else only & view.committed)
        reasons = self.check(view, key, sites)
        counted = [self._good[site] for site in sites if reasons[site] is None]
        excluded = [Excluded(site=site, commitment=view.commitments[site], reason=reason)
                    for site, reason in reasons.items() if reason is not None]
        if not counted:
            return None
        made = certify(self.spec, self.read_parent(view), (counted, excluded), key=key, spec_digest=self.spec_digest,
                       rejections=view.rejections, previous=self.read_previous(view))
        self._made = (made.manifest.checkpoint, made.tensors)
        self._manifests[made.manifest_digest] = made.manifest
        return made

    def judge(self, certified: Certified, view: RunView) -> tuple[bool, float | None]:
        """Whether the checkpoint passes this site's gate, and its macro-F1 on the site's validation cells."""
        return self.task.judge(certified.tensors, self.read_parent(view)[1])

    def take_checked(self, other: RunWork) -> None:
        """Hold the contributions that another site in this process has fetched and checked, as if this one had."""
        self._round, self._good = other._round, dict(other._good)

    def _enter(self, key: RoundKey) -> None:
        if key != self._round:
            self._round, self._good = key, {}


def load_statistics_source(store: Store, spec: TrainedSpec) -> StatisticsSpec:
    """The spec of the statistics run that a training run stands on, found by the digest that the spec names."""
    source = read_spec(store, spec.statistics.spec)
    if not isinstance(source, StatisticsSpec):
        raise SpecError(f"the spec {spec.statistics.spec[:12]}… is no statistics run's")
    return source


def check_statistics(spec: TrainedSpec, view: RunView) -> None:
    """Whether the statistics that a spec names are what the consortium agreed on in that run. Raises `SpecError`."""
    _check_reference(spec.statistics, view, key="statistics", what="stands on other statistics")


def load_trained(store: Store, spec: EvaluationSpec, view_run: Callable[[int], RunView]
                 ) -> tuple[TrainedSpec, dict[str, npt.NDArray[Any]]]:
    """Spec and checkpoint of the run that is evaluated, which the chain must show as the spec names them.

    Raises
    ------
    SpecError
        If the chain shows others, or that run trained no model.
    """
    _check_reference(spec.trained, view_run(spec.trained.run), key="trained", what="evaluates another model")
    source = read_spec(store, spec.trained.spec)
    if not isinstance(source, TrainedSpec):
        raise SpecError(f"run {spec.trained.run} trained no model", hint="`swarmchain run list` shows the tasks")
    return source, read_checkpoint(store, spec.trained.checkpoint, source)


def read_own(config: SiteConfig, run: int, spec: TrainedSpec) -> Arrays:
    """What this site keeps to itself of a run's model, none where the spec has no such parts.

    Raises
    ------
    SpecError
        If the spec has such parts and this site did not train them.
    """
    layout = local_layout(spec)
    own = Keeper(config.work_dir / "training" / str(run), "local", layout).read(spec.limits.rounds)
    if layout and own is None:
        raise SpecError(f"{config.name} holds no {', '.join(layout)} of its own for run {run}",
                        hint="only sites that trained in the run can use its model")
    return own or {}


def _check_reference(named: RunRef, view: RunView, *, key: str, what: str) -> None:
    if not view.finalized_round or (view.spec, view.checkpoint) != (named.spec, named.checkpoint):
        raise SpecError(
            f"{key}: run {named.run} has not the checkpoint {named.checkpoint[:12]}… on chain that the spec names",
            hint=f"do not join this run: whoever proposed it {what}",
        )


def check_run(config: SiteConfig, store: Store, view: RunView, *, site: int, view_run: Callable[[int], RunView]
              ) -> Spec:
    """Whether this site's data satisfy a run's spec. Raises what names the field if not."""
    try:
        return RunWork(config, store, view, site=site, view_run=view_run).spec
    except SwarmError as exc:
        raise type(exc)(f"cannot join run {view.run}: {exc.message}", hint=exc.hint) from exc
