"""All that one site does for one run: prepare its cells, contribute, certify, judge.

Knows the run's tensors and the site's cells, and neither keys nor transactions: those are the agent's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swarmchain.certify import NO_PARENT, Arrays, Certified, certify, gather
from swarmchain.checkpoint import encode_tensors
from swarmchain.config import SiteConfig
from swarmchain.data import SiteData, compute_standardization, compute_statistics, load_site_data
from swarmchain.errors import SpecError, SwarmError
from swarmchain.protocol import RoundKey, RunView
from swarmchain.spec import (
    CellTypeSpec,
    Spec,
    StatisticsSpec,
    contribution_layout,
)
from swarmchain.store import Store, read_checkpoint, read_manifest, read_spec


class RunWork:
    """All that one site does for one run, over the tensors and cells of that run.

    Parameters
    ----------
    view_run
        Asks the contract for any run, to see that the statistics that a spec names are those on record.

    Raises
    ------
    SpecError, DataError
        If the spec stands on other statistics, or the site's data cannot satisfy it.
    """

    def __init__(self, config: SiteConfig, store: Store, view: RunView, *, site: int,
                 view_run: Callable[[int], RunView]) -> None:
        self.store = store
        self.site = site
        self.spec_digest = view.spec
        self.spec = read_spec(store, view.spec)
        self.data: SiteData = load_site_data(config, self.spec)
        self._parent: tuple[str, Arrays] = (NO_PARENT, {})
        self._cells: Any = None
        if isinstance(self.spec, CellTypeSpec):
            check_statistics(self.spec, view_run(self.spec.statistics.run))
            self._cells = self._prepare(self.spec, config.agent.threads)

    def _prepare(self, spec: CellTypeSpec, threads: int) -> Any:
        """Standardised cells; also checks that the seed checkpoint stands on the statistics that the spec names."""
        import torch

        from swarmchain.trainer import prepare_training

        torch.set_num_threads(threads)
        source = load_statistics_source(self.store, spec)
        statistics = read_checkpoint(self.store, spec.statistics.checkpoint, source)
        constants = compute_standardization(statistics, source.panel.features, spec.panel)
        seed = read_checkpoint(self.store, spec.seed_checkpoint, spec)
        for name, expected in constants.items():
            if seed[name].tobytes() != expected.tobytes():
                raise SpecError(
                    f"the seed checkpoint's {name} is not what the statistics run {spec.statistics.run} gives",
                    hint="do not join this run: whoever proposed it changed the standardisation",
                )
        rows = [source.labels.index(label) for label in spec.labels]
        return prepare_training(self.data, spec, constants, statistics["cells_per_label"][rows])

    def read_parent(self, view: RunView) -> tuple[str, Arrays]:
        """Digest and tensors of the checkpoint that the newest round starts from.

        A finalized newest round has replaced its own parent on chain; then the manifest names it.
        """
        if isinstance(self.spec, StatisticsSpec):
            return NO_PARENT, {}
        if view.finalized_round == view.round_id and view.round_id > 0:
            digest = read_manifest(self.store, view.manifest).parent
        else:
            digest = view.checkpoint if view.finalized_round else self.spec.seed_checkpoint
        if self._parent[0] != digest:
            self._parent = (digest, read_checkpoint(self.store, digest, self.spec))
        return self._parent

    def contribute(self, view: RunView) -> tuple[bytes, int, dict[str, float]]:
        """Bytes of this site's contribution, its number of training cells, and remarks."""
        layout = contribution_layout(self.spec)
        if isinstance(self.spec, StatisticsSpec):
            tensors: Arrays = compute_statistics(self.data, labels=len(self.spec.labels))
            return encode_tensors(tensors, layout), len(self.data.train), {}
        from swarmchain.trainer import train_round

        _, parent = self.read_parent(view)
        found = train_round(parent, self._cells, self.spec, round_id=view.round_id, site=self.site)
        return encode_tensors(found.deltas, layout), found.samples, found.metrics

    def certify(self, view: RunView, key: RoundKey, *, only: frozenset[int] | None = None) -> Certified | None:
        """Recompute the round's merge from what lies in the store; None if nothing usable does."""
        gathered = gather(self.store, view, self.spec, key=key, only=only)
        if not gathered[0]:
            return None
        return certify(self.spec, self.read_parent(view), gathered, key=key, spec_digest=self.spec_digest,
                       rejections=view.rejections)

    def judge(self, certified: Certified, view: RunView) -> tuple[bool, float | None]:
        """Whether the checkpoint passes this site's gate, and its macro-F1 on the site's validation cells."""
        if isinstance(self.spec, StatisticsSpec):
            return True, None
        from swarmchain.trainer import score_checkpoint

        score = score_checkpoint(certified.tensors, self._cells, self.spec)
        if score is None:
            return True, None
        before = score_checkpoint(self.read_parent(view)[1], self._cells, self.spec) or 0.0
        return score >= before - self.spec.gate.score_drop_max, score


def load_statistics_source(store: Store, spec: CellTypeSpec) -> StatisticsSpec:
    """The spec of the statistics run that a training run stands on, found by the digest that the spec names."""
    source = read_spec(store, spec.statistics.spec)
    if not isinstance(source, StatisticsSpec):
        raise SpecError(f"the spec {spec.statistics.spec[:12]}… is no statistics run's")
    return source


def check_statistics(spec: CellTypeSpec, view: RunView) -> None:
    """Whether the statistics that a spec names are what the consortium agreed on in that run. Raises `SpecError`."""
    named = spec.statistics
    if not view.finalized_round or (view.spec, view.checkpoint) != (named.spec, named.checkpoint):
        raise SpecError(
            f"statistics: run {named.run} has not the checkpoint {named.checkpoint[:12]}… on chain that the spec names",
            hint="do not join this run: whoever proposed it stands on other statistics",
        )


def check_run(config: SiteConfig, store: Store, view: RunView, *, site: int, view_run: Callable[[int], RunView]
              ) -> Spec:
    """Whether this site's data satisfy a run's spec. Raises what names the field if not."""
    try:
        return RunWork(config, store, view, site=site, view_run=view_run).spec
    except SwarmError as exc:
        raise type(exc)(f"cannot join run {view.run}: {exc.message}", hint=exc.hint) from exc
