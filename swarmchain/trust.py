"""Who has a share in a merge: what the sites measured on their own validation cells, added up from round to round.

A hostile contribution may look like an honest one of a site that sees other cells than the rest; what it does to the
others' cells of the very labels that it was trained on does not. Every site says in its opening what each contribution
of the last finalized round does to a loss on its own validation cells, before it knows what anyone else says. The merge
believes what a majority of the other sites agrees on, and remembers it in the manifest. A site whose evidence is above
the limit has no weight; it is still rated, and comes back when its contributions have helped a majority again as much
as they harmed before.

Integers only, in 1/1000 nat, and pure: everybody computes the same from what is on record. The evidence is a cumulative
sum, as in Page's test for a change (1954).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from swarmchain.merging import Trust
from swarmchain.protocol import Rating

Ratings = Mapping[int, Sequence[Rating]]

# A label that makes less of a site's training examples than this is not claimed: what a contribution does to it says
# more of the other labels' number than of the site's intent.
CLAIMED_SHARE_MIN = 0.05


@dataclass(frozen=True)
class Claim:
    """A contribution to be rated: whose it is, how the merge clipped it, what labels it is about, its coded tensors."""

    site: int
    clip_factor: float
    labels: tuple[int, ...]
    tensors: Mapping[str, npt.NDArray[Any]]


def update_harm(before: Mapping[int, int], ratings: Ratings, settings: Trust, *, rated: Set[int]) -> dict[int, int]:
    """The evidence against each site after one more round of ratings; sites without any are not named.

    Parameters
    ----------
    before
        The evidence so far.
    ratings
        Of every site that disclosed a good contribution in this round, also those that rate nobody.
    rated
        Whose contributions were there to rate; what is said of others, or of oneself, counts for nothing.
    """
    found = dict(before)
    shortfalls = {rater: _compute_shortfalls(own, settings, rated=rated - {rater}) for rater, own in ratings.items()}
    for site in rated:
        said = [shortfalls[rater].get(site) for rater in ratings if rater != site]
        agreed = find_agreed(said)
        if agreed is None:
            continue
        beyond = max(abs(agreed) - settings.slack_mnat, 0)
        found[site] = min(max(found.get(site, 0) + (beyond if agreed > 0 else -beyond), 0), settings.memory_mnat)
    return {site: harm for site, harm in sorted(found.items()) if harm > 0}


def find_agreed(said: Sequence[int | None]) -> int | None:
    """The highest number that a majority reaches; None where fewer than a majority say anything."""
    known = sorted((number for number in said if number is not None), reverse=True)
    needed = len(said) // 2 + 1
    return known[needed - 1] if len(known) >= needed else None


def choose_harmful(harm: Mapping[int, int], sites: Iterable[int], settings: Trust) -> frozenset[int]:
    """The sites that have no weight, among those whose contributions are good: above the limit, the worst first.

    Never so many that fewer than a majority of `sites` would count.
    """
    present = set(sites)
    above = sorted((-harm[site], site) for site in present & harm.keys() if harm[site] > settings.harm_max_mnat)
    return frozenset(site for _, site in above[: (len(present) - 1) // 2])


def _compute_shortfalls(own: Sequence[Rating], settings: Trust, *, rated: Set[int]) -> dict[int, int]:
    """How much worse each contribution did for one rater than `benefit_percent` of what the middle one did."""
    effects = {rating.site: rating.effect_mnat for rating in own if rating.site in rated}
    if not effects:
        return {}
    benefit = max(0, -statistics.median_high(effects.values()))
    return {site: effect + benefit * settings.benefit_percent // 100 for site, effect in effects.items()}
