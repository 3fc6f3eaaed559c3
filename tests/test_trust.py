"""Who has a share: the rules alone, the rating of contributions, and a swarm with one hostile site among others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_cells
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmchain.audit import audit_run, read_record
from swarmchain.certify import NO_PARENT, Certified, Gathered, certify
from swarmchain.checkpoint import allocate_tensors
from swarmchain.codec import encode_deltas
from swarmchain.consortium import AGENT, Polling, start_consortium
from swarmchain.errors import OpeningError
from swarmchain.history import read_rounds
from swarmchain.layouts import checkpoint_layout, parameter_layout
from swarmchain.merge import Input, compute_norm
from swarmchain.merging import Trust
from swarmchain.model import draw_state
from swarmchain.planning import plan_cell_type, plan_statistics, read_statistics
from swarmchain.protocol import (
    EFFECT_MNAT_MAX,
    Opening,
    Rating,
    RoundKey,
    compute_commitment,
    encode_canonical,
    parse_manifest,
    parse_opening,
)
from swarmchain.rating import CELLS_MAX, Rater, choose_rows, find_labels
from swarmchain.spec import CellTypeSpec, Limits, Panel, StatisticsRef, Training
from swarmchain.trainer import TrainingSet, train_round
from swarmchain.trust import Claim, choose_harmful, find_agreed, update_harm

ZERO = "0" * 64
KEY = RoundKey(1, "0x" + "ab" * 20, 1, 2)
SETTINGS = Trust()
WORST = EFFECT_MNAT_MAX


def rate(**effects: int) -> tuple[Rating, ...]:
    """Ratings by site: `_3=-20` says that site 3 helped by 20."""
    return tuple(Rating(site=int(name[1:]), effect_mnat=effect) for name, effect in sorted(effects.items()))


def rate_all(raters: range, effect: Callable[[int, int], int]) -> dict[int, tuple[Rating, ...]]:
    return {i: tuple(Rating(site=j, effect_mnat=effect(i, j)) for j in raters if j != i) for i in raters}


# -- the rules


def test_site_that_a_majority_finds_harmful_has_no_weight() -> None:
    # site 4 is hostile, and lies about all others
    ratings = rate_all(range(5), lambda i, j: WORST if i == 4 else 200 if j == 4 else -100)
    harm = update_harm({}, ratings, SETTINGS, rated=set(range(5)))
    assert harm == {4: 200 + SETTINGS.benefit_percent - SETTINGS.slack_mnat}
    assert choose_harmful(harm, range(5), SETTINGS) == {4}


def test_site_that_does_nothing_for_anyone_has_no_weight() -> None:
    """Noise moves no loss to speak of; where the others help much it is found out all the same."""
    ratings = rate_all(range(5), lambda i, j: 5 if j == 4 else -400)
    harm = update_harm({}, ratings, SETTINGS, rated=set(range(5)))
    assert choose_harmful(harm, range(5), SETTINGS) == {4}


def test_site_comes_back_when_it_has_helped_as_much() -> None:
    won_back = 300 * (100 - SETTINGS.benefit_percent) // 100 - SETTINGS.slack_mnat  # in each round
    harm = {2: 2 * won_back + SETTINGS.harm_max_mnat}
    for _ in range(2):
        assert choose_harmful(harm, range(4), SETTINGS) == {2}
        harm = update_harm(harm, rate_all(range(4), lambda i, j: -300), SETTINGS, rated={0, 1, 2, 3})
    assert harm == {2: SETTINGS.harm_max_mnat}
    assert not choose_harmful(harm, range(4), SETTINGS)


def test_evidence_stays_where_nobody_rates() -> None:
    assert update_harm({1: 70}, {0: (), 1: (), 2: ()}, SETTINGS, rated={0, 1, 2}) == {1: 70}
    assert update_harm({1: 70}, {0: rate(_1=900), 1: (), 2: ()}, SETTINGS, rated={0, 1, 2}) == {1: 70}


def test_evidence_is_bounded() -> None:
    ratings = rate_all(range(3), lambda i, j: WORST)
    assert set(update_harm({}, ratings, SETTINGS, rated={0, 1, 2}).values()) == {SETTINGS.memory_mnat}


def test_what_is_said_of_oneself_or_of_who_was_not_there_counts_for_nothing() -> None:
    ratings = {0: rate(_0=-WORST, _1=0, _7=WORST), 1: rate(_0=300, _7=WORST), 2: rate(_0=300, _1=0, _7=WORST)}
    assert update_harm({}, ratings, SETTINGS, rated={0, 1, 2}) == {0: 270}


SAID = st.lists(st.none() | st.integers(-WORST, WORST), min_size=1, max_size=9)


@given(said=SAID)
def test_agreed_number_is_what_a_majority_reaches(said: list[int | None]) -> None:
    agreed = find_agreed(said)
    reaches = [n for n in said if n is not None]
    if agreed is None:
        assert 2 * len(reaches) <= len(said)
    else:
        assert 2 * sum(n >= agreed for n in reaches) > len(said) >= 2 * sum(n > agreed for n in reaches)


@settings(max_examples=25)
@given(honest=st.integers(3, 6), data=st.data())
def test_minority_cannot_exclude_anybody_whom_no_other_finds_harmful(honest: int, data: st.DataObject) -> None:
    """However the liars lie, and whatever honest sites say within the slack."""
    liars = data.draw(st.integers(0, honest - 2))
    effects = st.integers(-WORST, SETTINGS.slack_mnat)
    rules = SETTINGS.model_copy(update={"benefit_percent": 0})
    harm: dict[int, int] = {}
    for _ in range(3):
        ratings = rate_all(range(honest + liars), lambda i, j: WORST if i >= honest else data.draw(effects))
        harm = update_harm(harm, ratings, rules, rated=set(ratings))
        assert not choose_harmful(harm, ratings, rules) & set(range(honest))


@given(harm=st.dictionaries(st.integers(0, 9), st.integers(1, 2_000)), sites=st.sets(st.integers(0, 9), min_size=1))
def test_a_majority_always_counts(harm: dict[int, int], sites: set[int]) -> None:
    left_out = choose_harmful(harm, sites, SETTINGS)
    assert left_out <= sites and len(sites - left_out) > len(left_out)
    assert all(harm[site] > SETTINGS.harm_max_mnat for site in left_out)
    assert choose_harmful(dict(reversed(harm.items())), sorted(sites, reverse=True), SETTINGS) == left_out


@given(data=st.data())
def test_order_of_arrival_changes_nothing(data: st.DataObject) -> None:
    effects = st.integers(-WORST, WORST)
    ratings = rate_all(range(5), lambda i, j: data.draw(effects))
    turned = {i: tuple(reversed(own)) for i, own in reversed(ratings.items())}
    rated = set(range(5))
    assert update_harm({1: 9}, ratings, SETTINGS, rated=rated) == update_harm({1: 9}, turned, SETTINGS, rated=rated)


# -- the certificate


def gather(ratings: dict[int, tuple[Rating, ...]], spec: CellTypeSpec) -> list[Gathered]:
    """A good contribution of each site, all equally long."""
    found = []
    for site, own in ratings.items():
        deltas = {name: np.full(shape, 0.5 + site, np.float32) / np.float32(0.5 + site)
                  for name, (_, shape) in parameter_layout(spec).items()}
        opening = Opening(digest=ZERO, samples=100, nonce=ZERO, ratings=own)
        found.append(Gathered(ZERO, opening, Input(site, 100, deltas, compute_norm(deltas))))
    return found


def certify_next(spec: CellTypeSpec, ratings: dict[int, tuple[Rating, ...]], before: Certified | None = None
                 ) -> Certified:
    _, parent = allocate_tensors(checkpoint_layout(spec))
    previous = (before.manifest_digest, before.manifest) if before else (NO_PARENT, None)
    return certify(spec, (ZERO, parent), (gather(ratings, spec), []), key=KEY, spec_digest=ZERO, rejections=0,
                   previous=previous)


def test_first_round_is_there_to_be_rated(spec: CellTypeSpec) -> None:
    nobody: dict[int, tuple[Rating, ...]] = dict.fromkeys(range(5), ())
    outer = {"kind": "momentum"}
    careful = CellTypeSpec.model_validate({**spec.model_dump(), "merge": {"method": "clipped_mean", "outer": outer}})
    first = certify_next(careful, nobody)
    assert first.manifest.step_scale == 0.0 and not any(tensor.any() for tensor in first.tensors.values())
    second = certify_next(careful, nobody, first)
    assert second.manifest.step_scale == 1.0 and second.tensors["layers.0.weight"].all()
    assert second.manifest.previous == first.manifest_digest and second.manifest.standing == ()


def test_certificate_names_who_has_no_weight_and_why(spec: CellTypeSpec) -> None:
    first = certify_next(spec, dict.fromkeys(range(5), ()))
    ratings = rate_all(range(5), lambda i, j: WORST if i == 4 else 300 if j == 4 else -100)
    second = certify_next(spec, ratings, first)
    last = second.manifest.included[4]
    assert (last.site, last.weight, last.clip_factor, last.doubt) == (4, 0.0, 1.0, "found harmful")
    assert [item.weight for item in second.manifest.included[:4]] == [0.25] * 4
    harm = 300 + SETTINGS.benefit_percent - SETTINGS.slack_mnat
    assert [(item.site, item.harm_mnat) for item in second.manifest.standing] == [(4, harm)]
    assert parse_manifest(second.manifest_bytes) == second.manifest
    third = certify_next(spec, dict.fromkeys(range(5), ()), second)  # nobody says anything: the evidence stands
    assert third.manifest.standing == second.manifest.standing and third.manifest.included[4].weight == 0.0


def test_without_trust_nobody_is_left_out(spec: CellTypeSpec) -> None:
    merge = {"method": "clipped_mean", "trust": None}
    blind = CellTypeSpec.model_validate({**spec.model_dump(), "merge": merge})
    first = certify_next(blind, dict.fromkeys(range(5), ()))
    second = certify_next(blind, rate_all(range(5), lambda i, j: WORST), first)
    assert first.manifest.step_scale == 1.0 and not second.manifest.standing
    assert all(item.weight > 0 and item.doubt is None for item in second.manifest.included)


# -- what an opening says of others


def test_commitment_binds_the_ratings() -> None:
    opening = Opening(digest=ZERO, samples=1, nonce=ZERO, ratings=rate(_1=5, _3=-5))
    assert parse_opening(encode_canonical(opening)) == opening
    for changed in (rate(_1=6, _3=-5), rate(_1=5), ()):
        other = opening.model_copy(update={"ratings": changed})
        assert compute_commitment(KEY, 0, other) != compute_commitment(KEY, 0, opening)


@pytest.mark.parametrize("ratings", [
    [{"site": 3, "effect_mnat": 1}, {"site": 1, "effect_mnat": 1}], [{"site": 1, "effect_mnat": 1}] * 2,
    [{"site": 256, "effect_mnat": 1}], [{"site": 1, "effect_mnat": WORST + 1}], [{"site": 1, "effect_mnat": 0.5}],
    [{"site": 1}]], ids=["order", "twice", "site", "effect", "fraction", "missing"])
def test_invalid_rating_makes_the_opening_invalid(ratings: list[Any]) -> None:
    opening = {"format": "swarmchain-opening/3", "digest": ZERO, "samples": 1, "nonce": ZERO, "ratings": ratings}
    with pytest.raises(OpeningError, match="ratings"):
        parse_opening(encode_canonical(opening))


def test_commitment_binds_the_labels() -> None:
    opening = Opening(digest=ZERO, samples=1, nonce=ZERO, labels=(0, 2))
    assert parse_opening(encode_canonical(opening)) == opening
    for changed in ((0,), (0, 1), ()):
        other = opening.model_copy(update={"labels": changed})
        assert compute_commitment(KEY, 0, other) != compute_commitment(KEY, 0, opening)


@pytest.mark.parametrize("labels", [[2, 0], [1, 1], [-1], [1000], [0.5], ["B cell"]])
def test_invalid_label_makes_the_opening_invalid(labels: list[Any]) -> None:
    opening = {"format": "swarmchain-opening/3", "digest": ZERO, "samples": 1, "nonce": ZERO, "ratings": [],
               "labels": labels}
    with pytest.raises(OpeningError, match="labels"):
        parse_opening(encode_canonical(opening))


# -- how a site rates


def make_site(seed: int, spec: CellTypeSpec, cells: int = 400) -> TrainingSet:
    """Cells of three classes that lie apart in the same way at every site."""
    generator = np.random.default_rng(seed)
    y = np.arange(cells) % 3
    x = generator.normal(size=(cells, 6)).astype(np.float32) + 2.0 * np.eye(3, 6, dtype=np.float32)[y]
    rows = np.arange(cells)
    train, validation = rows[rows % 5 > 0], rows[rows % 5 == 0]
    return TrainingSet(torch.from_numpy(x), torch.from_numpy(y), train, validation, np.ones(len(train)) / len(train))


@pytest.fixture
def spec() -> CellTypeSpec:
    return CellTypeSpec(
        name="t", panel=Panel(features=tuple("abcdef")), labels=("x", "y", "z"), seed_checkpoint=ZERO,
        limits=Limits(rounds=8, sites_to_start=5), statistics=StatisticsRef(run=1, spec=ZERO, checkpoint=ZERO),
        training=Training(steps=10))


def claim(site: int, tensors: Any, labels: tuple[int, ...] = (0, 1, 2)) -> Claim:
    return Claim(site, 1.0, labels, tensors)


def test_site_without_a_class_is_rated_on_what_it_was_trained_on(spec: CellTypeSpec) -> None:
    """Whoever never sees a class unlearns it: that is no harm that a site means."""
    spec = spec.model_copy(update={"training": Training(steps=40, lr=1e-2)})
    start, rater = draw_state(spec), make_site(0, spec)
    trained = train_round(start, rater, spec, round_id=1, site=0).deltas
    parent = {name: value + trained[name] for name, value in start.items()}
    partial = make_site(1, spec)
    partial = replace(partial, train=partial.train[partial.y.numpy()[partial.train] < 2])
    partial = replace(partial, draw=np.ones(len(partial.train)) / len(partial.train))
    assert find_labels(partial) == (0, 1)
    deltas = train_round(parent, partial, spec, round_id=2, site=1).deltas
    of_all, of_its_own = (Rater(rater, spec).rate(parent, [claim(1, deltas, labels)])[0].effect_mnat
                          for labels in ((0, 1, 2), (0, 1)))
    assert of_its_own < 0 < of_all
    # what nobody here has, or no claim at all, is rated by everything: nobody escapes by claiming it
    assert {Rater(rater, spec).rate(parent, [claim(1, deltas, labels)])[0].effect_mnat
            for labels in ((), (7,))} == {of_all}


def test_labels_that_are_rare_at_a_site_are_not_claimed(spec: CellTypeSpec) -> None:
    site = make_site(0, spec, cells=300)
    site.y[:] = 0
    site.y[site.train[:12]] = 1
    site.y[site.train[12:23]] = 2
    assert find_labels(site) == (0, 1)  # 12 and 11 of 240


def test_training_helps_and_its_reverse_harms(spec: CellTypeSpec) -> None:
    parent, site = draw_state(spec), make_site(0, spec)
    deltas = train_round(parent, make_site(1, spec), spec, round_id=1, site=1).deltas
    reverse = {name: -delta for name, delta in deltas.items()}
    noise = {name: np.zeros_like(delta) for name, delta in deltas.items()}
    found = Rater(site, spec).rate(parent, [claim(3, reverse), claim(1, deltas), claim(2, noise)])
    assert [r.site for r in found] == [1, 2, 3]
    assert found[0].effect_mnat < -50 and found[1].effect_mnat == 0 and found[2].effect_mnat > 50
    assert found == Rater(site, spec).rate(parent, [claim(1, deltas), claim(2, noise), claim(3, reverse)])
    coded, _ = encode_deltas(deltas, "int8")
    assert abs(Rater(site, spec).rate(parent, [claim(1, coded)])[0].effect_mnat - found[0].effect_mnat) <= 2


def test_contribution_that_gives_no_number_is_as_bad_as_can_be(spec: CellTypeSpec) -> None:
    parent = draw_state(spec)
    huge = {name: np.full(shape, 3e38, np.float32) for name, (_, shape) in parameter_layout(spec).items()}
    assert Rater(make_site(0, spec), spec).rate(parent, [claim(1, huge)])[0].effect_mnat == WORST


def test_site_without_validation_cells_rates_nobody(spec: CellTypeSpec) -> None:
    site = replace(make_site(0, spec), validation=np.array([], np.int64))
    assert Rater(site, spec).rate(draw_state(spec), []) == ()


def test_cells_to_rate_by_are_few_and_of_every_class(spec: CellTypeSpec) -> None:
    site = make_site(0, spec, cells=3_000)
    site.y[site.validation[1:]] = 0
    site.y[site.validation[0]] = 2
    rows = choose_rows(site)
    assert len(rows) == CELLS_MAX // 2 + 1 and set(rows) <= set(site.validation)
    assert set(site.y[rows].tolist()) == {0, 2}


# -- a swarm


SITES, HOSTILE = 4, 2
PROGRAM = str(Path(__file__).with_name("faulty.py"))


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Agents as processes; site-2 hands in its training with the sign turned, and swears that all others harm it."""
    folder = tmp_path_factory.mktemp("trust")
    files = {f"site-{i}": write_cells(folder / f"{i}.h5ad", seed=i, cells=150) for i in range(SITES)}
    with start_consortium(folder / "swarm", files, seed=1, label_column="cell_type",
                          polling=Polling(poll_s=0.1, stagger_s=0.5)) as found:
        limits = Limits(rounds=5, sites_to_start=SITES)
        first = found.propose(plan_statistics([s.card for s in found.sites], name="sums", sites_to_start=SITES))
        for i, site in enumerate(found.sites):
            program = (PROGRAM, "--fault", "HOSTILE", "--at", "lasting") if i == HOSTILE else AGENT
            found.start_agent(site, [first, first + 1], program=program)
        found.follow(lambda *_: None, until=lambda: found.contract.view_run(first).finalized_round > 0, timeout_s=120)
        view = found.contract.view_run(first)
        spec, blob = plan_cell_type(read_statistics(found.store, view), view, name="trained", limits=limits,
                                    sites_per_feature_min=2, training=Training(steps=10))
        found.store.put_blob(blob)
        run = found.propose(spec)
        found.follow(lambda *_: None, timeout_s=120)
        yield found, run


def test_hostile_site_ends_without_weight_and_nobody_else(swarm: Any) -> None:
    found, run = swarm
    rounds = read_rounds(found.contract, found.store, run)
    manifests = [record.manifest for record in rounds]
    assert len(manifests) == 5 and all(manifests)
    assert not any(item.doubt for item in manifests[0].included)
    for record in rounds[1:]:
        by_site = {item.site: item for item in record.manifest.included}
        assert {site for site, item in by_site.items() if item.doubt} == {HOSTILE}
        assert by_site[HOSTILE].weight == 0.0 and record.explain_absence(HOSTILE) == "found harmful"
        assert all(item.weight > 0.2 for site, item in by_site.items() if site != HOSTILE)
    assert {item.site for item in manifests[-1].standing} == {HOSTILE}
    assert [a.previous for a in manifests[1:]] == [record.manifest_digest for record in rounds[:-1]]


def test_audit_of_such_a_run_is_sound_and_says_why(swarm: Any, tmp_path: Path) -> None:
    found, run = swarm
    audit = audit_run(read_record(found.contract, run), found.store, spool_folder=tmp_path)
    assert audit.is_sound, audit.all_findings
    assert [r.excluded for r in audit.rounds] == [{}] + [{f"site-{HOSTILE}": "found harmful"}] * 4
