"""A whole run in one process: the sites' own work and the contract's rules, without keys, chain and agents.

What a benchmark needs that trains many swarms: the same bytes as agents on a real chain give, without waiting for any
block or process. Every site's share is `work.RunWork`, as its agent does it, with codec, residuals, local tensors and
gate; contributions go through a store and are hashed and checked again on their way to the merge; rounds, votes and
quorum are those of `rules.Replica`. What is left out is what nobody computes with: signatures, gas, time, and that
every site fetches all contributions and recomputes the merge (one does it for all).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from swarmchain.certify import Arrays, Certified
from swarmchain.config import AgentConfig, ChainConfig, DataConfig, KeysConfig, SiteCard, SiteConfig, StoreConfig
from swarmchain.duties import is_over
from swarmchain.errors import RunFailed
from swarmchain.protocol import (
    BPS,
    Opening,
    Outcome,
    RoundKey,
    RunView,
    Terms,
    compute_commitment,
    compute_digest,
    encode_canonical,
)
from swarmchain.rules import Replica, Vote
from swarmchain.spec import Spec, encode_spec
from swarmchain.store import Store, read_checkpoint, read_spec
from swarmchain.work import RunWork

CHAIN_ID = 1
CONTRACT = "0x" + "c" * 40
WINDOW_S = 3_600
NEVER_S = 1e9


@dataclass(frozen=True)
class RoundPlayed:
    """One round: how it ended, its checkpoint (empty if none), each site's score, and where the seconds went."""

    round_id: int
    outcome: Outcome
    checkpoint: str
    scores: dict[str, float | None]
    train_s: dict[str, float]
    merge_s: float
    judge_s: dict[str, float]


@dataclass(frozen=True)
class Played:
    """A run that is over: its view, the final checkpoint's tensors, and its rounds."""

    view: RunView
    spec: Spec
    tensors: Arrays
    rounds: tuple[RoundPlayed, ...]

    @property
    def checkpoint(self) -> str:
        """Digest of the final checkpoint: the one that agents on a chain arrive at."""
        return self.view.checkpoint


@dataclass
class InProcess:
    """Sites that share a rulebook and a store.

    Parameters
    ----------
    folder
        Empty room for the store and the sites' own files.
    data
        Settings of each site's cells; the order is that of the sites' indices.
    """

    folder: Path
    data: Mapping[str, DataConfig]
    store: Store = field(init=False)
    configs: list[SiteConfig] = field(init=False)

    def __post_init__(self) -> None:
        (self.folder / "store").mkdir(parents=True)
        self.store = Store(str(self.folder / "store"))
        self.configs = [_configure(self.folder, name, data) for name, data in self.data.items()]
        self._keys = [f"0x{i + 1:040x}" for i in range(len(self.configs))]
        self._replica = Replica(self._keys)
        self._now = 0

    def list_cards(self) -> list[SiteCard]:
        """What each site tells the others: names of features and labels. Raises `DataError`."""
        from swarmchain.data import read_names

        cards = []
        for config, key in zip(self.configs, self._keys, strict=True):
            settings = config.cells
            assert settings is not None
            features, labels = read_names(Path(settings.path), settings.label_column, settings=settings)
            cards.append(SiteCard(name=config.name, address=key, features=tuple(features), labels=tuple(labels)))
        return cards

    def propose(self, spec: Spec, *, seed_checkpoint: bytes = b"") -> int:
        """Put a spec, and the seed checkpoint that it names, on record, and let every site join; the run's number."""
        if seed_checkpoint:
            self.store.put_blob(seed_checkpoint)
        terms = Terms(WINDOW_S, WINDOW_S, sites_min=min(2, len(self._keys)))
        run = self._replica.propose_run(self._keys[0], self.store.put_blob(encode_spec(spec)), terms)
        for key in self._keys:
            self._replica.join_run(key, run)
        return run

    def view_run(self, run: int) -> RunView:
        """A run as the contract would show it."""
        return self._replica.view_run(run, now=self._now)

    def play(self, run: int, *, watch: Callable[[RoundPlayed], None] = lambda played: None) -> Played:
        """Every round of a run.

        Raises
        ------
        SpecError, DataError
            If a site's cells cannot serve the spec.
        RunFailed
            If no round was finalized.
        """
        view = self.view_run(run)
        spec = read_spec(self.store, view.spec)
        works = [RunWork(config, self.store, view, site=i, view_run=self.view_run)
                 for i, config in enumerate(self.configs)]
        rounds = []
        for played in self._play_rounds(run, spec, works):
            rounds.append(played)
            watch(played)
        view = self.view_run(run)
        if not view.finalized_round:
            raise RunFailed(f"run {run} of {spec.name!r} ended without a checkpoint",
                            hint="every site's gate refused each round: lower lr, or raise gate.score_drop_max")
        return Played(view, spec, read_checkpoint(self.store, view.checkpoint, spec), tuple(rounds))

    def _play_rounds(self, run: int, spec: Spec, works: list[RunWork]) -> Iterator[RoundPlayed]:
        while not is_over(self.view_run(run), spec.limits):
            self._now += 1
            self._replica.open_round(self._keys[0], run, now=self._now)
            view = self.view_run(run)
            key = RoundKey(CHAIN_ID, CONTRACT, run, view.round_id)
            train_s = {config.name: self._contribute(work, view, key)
                       for config, work in zip(self.configs, works, strict=True)}
            view, started = self.view_run(run), time.perf_counter()
            certified = works[0].certify(view, key)
            assert certified is not None, "every site has disclosed a contribution of its own making"
            self.store.put_blob(certified.checkpoint, digest=certified.manifest.checkpoint)
            self.store.put_blob(certified.manifest_bytes)
            for work in works[1:]:
                work.take_checked(works[0])
            merge_s = time.perf_counter() - started
            scores, judge_s = self._vote(works, certified, view)
            view = self.view_run(run)
            is_final = view.outcome is Outcome.FINALIZED
            yield RoundPlayed(view.round_id, view.outcome, certified.manifest.checkpoint if is_final else "", scores,
                              train_s, merge_s, judge_s)

    def _contribute(self, work: RunWork, view: RunView, key: RoundKey) -> float:
        """Train, commit and disclose; the seconds that took."""
        started = time.perf_counter()
        data, samples, _ = work.contribute(view, key)
        digest = self.store.put_blob(data)
        nonce = compute_digest(f"{key.run} {key.round_id} {work.site} {digest}".encode())
        opening = Opening(digest=digest, samples=samples, labels=work.task.labels, ratings=work.rate(view), nonce=nonce)
        commitment = compute_commitment(key, work.site, opening)
        self._replica.commit(self._keys[work.site], key.run, key.round_id, commitment, now=self._now)
        self.store.put_opening(commitment, encode_canonical(opening))
        return time.perf_counter() - started

    def _vote(self, works: list[RunWork], certified: Certified, view: RunView
              ) -> tuple[dict[str, float | None], dict[str, float]]:
        """Every site judges, then all vote; scores and seconds by site."""
        scores: dict[str, float | None] = {}
        spent: dict[str, float] = {}
        for work in works:
            started = time.perf_counter()
            accept, score = work.judge(certified, view)
            vote = Vote(accept, certified.manifest.checkpoint, certified.manifest_digest)
            self._replica.vote(self._keys[work.site], view.run, view.round_id, vote,
                               score_bps=round((score or 0.0) * BPS), now=self._now)
            name = self.configs[work.site].name
            scores[name], spent[name] = score, time.perf_counter() - started
        return scores, spent


def _configure(folder: Path, name: str, data: DataConfig) -> SiteConfig:
    """A site's settings without key and chain, which nothing here asks for."""
    home = folder / name.replace("/", "_")
    return SiteConfig(
        name=name, chain=ChainConfig(rpc_urls=("in process",), deployment=""),
        store=StoreConfig(url=str(folder / "store")), keys=KeysConfig(keystore=""), data=data,
        agent=AgentConfig(work_dir=str(home / "work"), threads=1, resume_s=NEVER_S), folder=home,
    )
