"""What was committed in a round → its checkpoint and its certificate, the manifest.

Reads openings and contributions from the store, which is not trusted: an opening counts only if it opens its
commitment, a contribution only if its bytes hash to the opened digest and are exactly what the spec prescribes.
Whoever runs this on the same commitments, openings and blobs gets the same two digests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from swarmchain.checkpoint import compute_size, decode_tensors, encode_tensors
from swarmchain.errors import BlobMissing, CheckpointError, OpeningError, StoreError
from swarmchain.merge import Input, merge_deltas, sum_statistics
from swarmchain.protocol import (
    Excluded,
    Included,
    Manifest,
    Opening,
    Reason,
    RoundKey,
    compute_commitment,
    compute_digest,
    encode_canonical,
    parse_opening,
)
from swarmchain.spec import Spec, StatisticsSpec, checkpoint_layout, contribution_layout
from swarmchain.store import Store

Arrays = Mapping[str, npt.NDArray[Any]]

CODE = "swarmchain-merge/1"  # moves whenever the same inputs would give other bytes
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

    checkpoint: bytes
    tensors: Arrays
    manifest: Manifest
    manifest_bytes: bytes

    @property
    def manifest_digest(self) -> str:
        """What is voted on, beside the checkpoint's digest."""
        return compute_digest(self.manifest_bytes)


def certify(
    spec: Spec, parent: tuple[str, Arrays], gathered: tuple[Sequence[Gathered], Sequence[Excluded]], *,
    key: RoundKey, spec_digest: str, rejections: int,
) -> Certified:
    """Merge what was gathered and write the certificate.

    Parameters
    ----------
    parent
        Digest and tensors of the parent checkpoint; `NO_PARENT` and no tensors for statistics.
    rejections
        Rejected rounds since the last finalized one; each halves the merged step.

    Raises
    ------
    CheckpointError
        If nothing was gathered, or the merge is not finite.
    """
    counted, excluded = gathered
    inputs = [item.contribution for item in counted]
    step_scale = 0.5 ** min(rejections, 30)
    tensors: Arrays
    if isinstance(spec, StatisticsSpec):
        tensors, shares = sum_statistics(inputs)
        method, step_scale = "sum", 1.0
    else:
        tensors, shares = merge_deltas(parent[1], inputs, spec.merge, step_scale=step_scale)
        method = spec.merge.method
    checkpoint = encode_tensors(tensors, checkpoint_layout(spec))
    by_site = {share.site: share for share in shares}
    included = tuple(
        Included(
            site=item.contribution.site, commitment=item.commitment, digest=item.opening.digest,
            samples=item.opening.samples, norm=by_site[item.contribution.site].norm,
            clip_factor=by_site[item.contribution.site].clip_factor, weight=by_site[item.contribution.site].weight,
        )
        for item in counted
    )
    manifest = Manifest(
        chain_id=key.chain_id, contract=key.contract.lower(), run=key.run, round=key.round_id, spec=spec_digest,
        parent=parent[0], method=method, step_scale=step_scale, included=included, excluded=tuple(excluded),
        checkpoint=compute_digest(checkpoint), code=CODE,
    )
    return Certified(checkpoint, tensors, manifest, encode_canonical(manifest))


def gather_one(store: Store, commitment: str, spec: Spec, *, key: RoundKey, site: int) -> Gathered | Reason:
    """Fetch and check what a committed site opened; the reason why it does not count if it does not.

    Raises
    ------
    StoreUnreachable
        If the store does not answer: that says nothing about the site.
    """
    try:
        opening = parse_opening(store.get_opening(commitment))
    except BlobMissing:
        return "withheld"
    except (OpeningError, StoreError):
        return "opening invalid"
    if compute_commitment(key, site, opening) != commitment:
        return "opening invalid"
    layout = contribution_layout(spec)
    try:
        data = store.get_blob(opening.digest, bytes_max=compute_size(layout))
        tensors = decode_tensors(data, layout)
    except BlobMissing:
        return "withheld"
    except (CheckpointError, StoreError):
        return "blob invalid"
    return Gathered(commitment, opening, Input(site=site, samples=opening.samples, tensors=tensors))
