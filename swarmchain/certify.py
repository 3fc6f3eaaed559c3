"""What was committed in a round → its checkpoint and its certificate, the manifest.

Reads openings and contributions from the store, which is not trusted: an opening counts only if it opens its
commitment, a contribution only if its bytes hash to the opened digest and are exactly what the spec prescribes.
Whoever runs this on the same commitments, openings and blobs gets the same two digests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmchain.checkpoint import allocate_tensors, compute_size, decode_tensors
from swarmchain.errors import BlobMissing, CheckpointError, OpeningError, StoreError, SwarmError
from swarmchain.layouts import Layout, checkpoint_layout
from swarmchain.merge import Input, Share, compute_norm, merge_deltas, sum_statistics
from swarmchain.merging import Trust
from swarmchain.protocol import (
    Excluded,
    Included,
    Manifest,
    Opening,
    Reason,
    RoundKey,
    Standing,
    compute_commitment,
    compute_digest,
    encode_canonical,
    parse_opening,
)
from swarmchain.spec import Spec, SumSpec
from swarmchain.spool import Spool
from swarmchain.store import Store
from swarmchain.trust import choose_harmful, update_harm

Arrays = Mapping[str, npt.NDArray[Any]]

CODE = "swarmchain-merge/3"  # moves whenever the same inputs would give other bytes
NO_PARENT = "0" * 64


@dataclass(frozen=True)
class Gathered:
    """One committed site's verified contribution."""

    commitment: str
    opening: Opening
    contribution: Input


@dataclass(frozen=True)
class Certified:
    """A round's result as one site computed it."""

    checkpoint: bytearray
    tensors: Arrays
    manifest: Manifest
    manifest_bytes: bytes

    @property
    def manifest_digest(self) -> str:
        """What is voted on, beside the checkpoint's digest."""
        return compute_digest(self.manifest_bytes)


def certify(
    spec: Spec, parent: tuple[str, Arrays], gathered: tuple[Sequence[Gathered], Sequence[Excluded]], *,
    key: RoundKey, spec_digest: str, rejections: int, previous: tuple[str, Manifest | None] = (NO_PARENT, None),
) -> Certified:
    """Merge what was gathered and write the certificate.

    Parameters
    ----------
    parent
        Digest and tensors of the parent checkpoint; `NO_PARENT` and no tensors where the merge is a sum.
    rejections
        Rejected rounds since the last finalized one; each halves the merged step.
    previous
        Digest and content of the last finalized round's manifest; `NO_PARENT` and None if there is none. It holds the
        evidence against the sites, and says whose contributions this round's openings rate.

    Raises
    ------
    CheckpointError
        If nothing was gathered.
    """
    counted, excluded = gathered
    inputs = [item.contribution for item in counted]
    step_scale = 0.5 ** min(rejections, 30)
    checkpoint, tensors = allocate_tensors(checkpoint_layout(spec))
    trust = None if isinstance(spec, SumSpec) else spec.merge.trust
    harm, harmful = weigh_evidence(trust, counted, previous[1])
    if isinstance(spec, SumSpec):
        method, bound, step_scale = "sum", None, 1.0
        shares = sum_statistics(inputs, into=tensors)
    else:
        method = spec.merge.method
        trusted = [item for item in inputs if item.site not in harmful]
        shares, bound = merge_deltas(parent[1], trusted, spec.merge, into=tensors, step_scale=step_scale)
        shares += [_leave_out(item, bound) for item in inputs if item.site in harmful]
        if trust is not None and trust.rate_first and previous[1] is None:
            step_scale = 0.0
            for name, tensor in parent[1].items():  # nor may an outer optimiser remember it
                np.copyto(tensors[name], tensor, casting="no")
    for tensor in tensors.values():
        tensor.flags.writeable = False
    by_site = {share.site: share for share in shares}
    included = tuple(
        Included(
            site=item.contribution.site, commitment=item.commitment, digest=item.opening.digest,
            samples=item.opening.samples, labels=item.opening.labels, norm=by_site[item.contribution.site].norm,
            clip_factor=by_site[item.contribution.site].clip_factor, weight=by_site[item.contribution.site].weight,
            doubt="found harmful" if item.contribution.site in harmful else None,
        )
        for item in counted
    )
    manifest = Manifest(
        chain_id=key.chain_id, contract=key.contract.lower(), run=key.run, round=key.round_id, spec=spec_digest,
        parent=parent[0], previous=previous[0], method=method, bound=bound, step_scale=step_scale, included=included,
        excluded=tuple(excluded), standing=tuple(Standing(site=site, harm_mnat=harm[site]) for site in sorted(harm)),
        checkpoint=compute_digest(checkpoint), code=CODE,
    )
    return Certified(checkpoint, tensors, manifest, encode_canonical(manifest))


def weigh_evidence(settings: Trust | None, counted: Sequence[Gathered], previous: Manifest | None
                   ) -> tuple[dict[int, int], frozenset[int]]:
    """The evidence against the sites after the ratings in these openings, and who has no weight for it."""
    if settings is None or previous is None:
        return {}, frozenset()
    before = {item.site: item.harm_mnat for item in previous.standing}
    ratings = {item.contribution.site: item.opening.ratings for item in counted}
    harm = update_harm(before, ratings, settings, rated={item.site for item in previous.included})
    return harm, choose_harmful(harm, ratings, settings)


def _leave_out(item: Input, bound: float | None) -> Share:
    """No weight, but the clip factor that it would have had: by it the others rate the contribution."""
    clip = 1.0 if bound is None or item.norm <= bound else bound / item.norm
    return Share(item.site, item.norm, clip, 0.0)


def gather_one(store: Store, spool: Spool, commitment: str, layout: Layout, *, key: RoundKey, site: int
               ) -> Gathered | Reason:
    """As `gather_many`, of one site."""
    return gather_many(store, spool, {site: commitment}, layout, key=key)[site]


def gather_many(store: Store, spool: Spool, commitments: Mapping[int, str], layout: Layout, *, key: RoundKey
                ) -> dict[int, Gathered | Reason]:
    """Fetch and check what committed sites opened, side by side; of each the reason why it does not count, if any.

    `layout` is the run's `contribution_layout`. The bytes come to lie in the spool's slot of each site, until the next
    are gathered there.

    Raises
    ------
    StoreUnreachable
        If the store does not answer: that says nothing about a site.
    """
    def read_opening(item: tuple[int, str]) -> Opening | Reason:
        try:
            return open_commitment(store, item[1], key=key, site=item[0])
        except BlobMissing:
            return "withheld"
        except (OpeningError, StoreError):
            return "opening invalid"

    found: dict[int, Gathered | Reason] = {}
    opened: dict[int, Opening] = {}
    for site, answer in zip(commitments, store.each(read_opening, list(commitments.items())), strict=True):
        if isinstance(answer, Opening):
            opened[site] = answer
        else:
            found[site] = answer
    slots = {site: spool.get_slot(site, compute_size(layout)) for site in opened}
    problems = store.read_many([(opened[site].digest, slot) for site, slot in slots.items()])
    for (site, data), problem in zip(slots.items(), problems, strict=True):
        found[site] = _find_reason(problem) if problem else _decode(commitments[site], opened[site], data, layout, site)
    return found


def _find_reason(problem: SwarmError) -> Reason:
    """Why a blob that was read does not count. Raises the problem if it says nothing about the blob."""
    if isinstance(problem, BlobMissing):
        return "withheld"
    if isinstance(problem, CheckpointError):
        return "blob malformed"
    if isinstance(problem, StoreError):
        return "blob altered"
    raise problem


def _decode(commitment: str, opening: Opening, data: memoryview, layout: Layout, site: int) -> Gathered | Reason:
    try:
        tensors = decode_tensors(data, layout, is_finite=False)
    except CheckpointError:
        return "blob malformed"
    norm = compute_norm(tensors)  # it meets every number
    if not math.isfinite(norm):
        return "not finite"
    return Gathered(commitment, opening, Input(site, opening.samples, tensors, norm))


def open_commitment(store: Store, commitment: str, *, key: RoundKey, site: int) -> Opening:
    """What a site disclosed under its commitment.

    Raises
    ------
    OpeningError
        If it is no opening, or that of another commitment.
    StoreError
        If it is not there, or cannot be read.
    """
    opening = parse_opening(store.get_opening(commitment))
    if compute_commitment(key, site, opening) != commitment:
        raise OpeningError("it is another commitment's")
    return opening
