"""The nouns of the protocol and its pure rules.

What the contract and every site must agree on, free of chain, store, tensors and clocks. Values that a stranger wrote
(openings, manifests) are pydantic models that refuse unknown keys and wrong types; the rest are frozen dataclasses.
Canonical JSON is RFC 8785; digests are SHA-256 as 64 lower-case hex digits; commitments are Keccak-256, as the
contract's `computeCommitment`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, Literal, Self

import rfc8785
from eth_hash.auto import keccak
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from swarmchain.errors import OpeningError

SITES_MAX = 256
BPS = 10_000
OPENING_BYTES_MAX = 16_384
MANIFEST_BYTES_MAX = 1 << 20
EFFECT_MNAT_MAX = 10_000
COMMITMENT_TYPE = keccak(b"swarmchain.commitment.v2")

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Why a commitment was not counted: nothing disclosed; an opening that does not open it; a blob that is not the bytes of
# its name; bytes that are not the tensors of the spec; NaN or infinity among them.
Reason = Literal["withheld", "opening invalid", "blob altered", "blob malformed", "not finite"]
# Why a good contribution has no weight: a majority of the other sites found the site's contributions harmful.
Doubt = Literal["found harmful"]
SiteIndex = Annotated[int, Field(ge=0, lt=SITES_MAX)]
LABELS_MAX = 1_000
Labels = Annotated[tuple[Annotated[int, Field(ge=0, lt=LABELS_MAX)], ...], Field(max_length=LABELS_MAX)]


class Phase(IntEnum):
    """Where a round stands; the numbers are the contract's."""

    NONE = 0
    COMMIT = 1
    VOTE = 2
    CLOSED = 3


class Outcome(IntEnum):
    """How a round ended; the numbers are the contract's."""

    PENDING = 0
    FINALIZED = 1
    REJECTED = 2
    EXPIRED = 3


class Change(IntEnum):
    """What the sites can change about themselves by majority; the numbers are the contract's."""

    ADMIT = 0
    REMOVE = 1
    ROTATE_KEY = 2
    RETIRE = 3


class Strict(BaseModel):
    """A value that crosses a trust boundary: frozen, no unknown keys, no coercion, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Terms:
    """What a run's proposer fixes on chain. Windows in seconds, quorum in 1/10,000 of the members."""

    commit_window_s: int
    vote_window_s: int
    sites_min: int
    quorum_bps: int = 0


@dataclass(frozen=True)
class RunView:
    """A run as the contract shows it at one time. Round fields speak of the newest round; see ISwarm.RunView."""

    run: int
    spec: str
    terms: Terms
    proposer: int
    joined: frozenset[int]
    successor: str
    round_id: int
    phase: Phase
    outcome: Outcome
    commit_deadline: int
    vote_deadline: int
    quorum: int
    members: frozenset[int]
    expected: frozenset[int]
    committed: frozenset[int]
    voted: frozenset[int]
    rejecting: frozenset[int]
    finalized_round: int
    checkpoint: str
    manifest: str
    head: str
    failures: int
    rejections: int
    commitments: dict[int, str]
    now: int

    @property
    def failures_in_a_row(self) -> int:
        """Rounds in a row, the newest included, that closed without a checkpoint."""
        if self.phase is not Phase.CLOSED:
            return self.failures
        return 0 if self.outcome is Outcome.FINALIZED else self.failures + 1


class Rating(Strict):
    """What one contribution of the last finalized round does to the rater's own validation cells.

    Those are the cells of the labels that it claims. `effect_mnat` is what it adds to their balanced cross-entropy, in
    1/1000 nat: below 0 it helps. See `rating`.
    """

    site: SiteIndex
    effect_mnat: Annotated[int, Field(ge=-EFFECT_MNAT_MAX, le=EFFECT_MNAT_MAX)]


class Opening(Strict):
    """What a site discloses once the Commit phase is over. Its commitment binds every field.

    `labels` are the run's labels, by number, that the contribution was chiefly trained on, for others to rate it by.
    `ratings` are of the last finalized round's contributions, by site; none where the site has nothing to rate by.
    """

    format: Literal["swarmchain-opening/3"] = "swarmchain-opening/3"
    digest: Digest
    samples: Annotated[int, Field(ge=1, le=10**12)]
    labels: Labels = ()
    ratings: Annotated[tuple[Rating, ...], Field(max_length=SITES_MAX)] = ()
    nonce: Digest

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        sites = [rating.site for rating in self.ratings]
        if sites != sorted(set(sites)):
            raise ValueError("the ratings are not in the order of the sites, each once")
        if list(self.labels) != sorted(set(self.labels)):
            raise ValueError("the labels are not in their order, each once")
        return self

    @property
    def salt(self) -> str:
        """The salt of the commitment: a digest of nonce, labels and ratings, so that the commitment binds them all."""
        ratings = [[r.site, r.effect_mnat] for r in self.ratings]
        return compute_digest(encode_canonical([self.nonce, list(self.labels), ratings]))


class Included(Strict):
    """One good contribution, and with what share a merge counted it.

    `labels` are what the site claims that it was trained on; `doubt` is why it has no weight, None if the method alone
    decided that.
    """

    site: int
    commitment: Digest
    digest: Digest
    samples: int
    labels: Labels = ()
    norm: float
    clip_factor: float
    weight: float
    doubt: Doubt | None = None


class Standing(Strict):
    """The evidence against one site, in 1/1000 nat; sites that are not named have none. See `trust`."""

    site: SiteIndex
    harm_mnat: Annotated[int, Field(ge=1)]


class Excluded(Strict):
    """One commitment that a merge did not count, and why."""

    site: int
    commitment: Digest
    reason: Reason


class Manifest(Strict):
    """A round's certificate: what went into its checkpoint, with which shares, and what did not and why.

    `previous` is the digest of the last finalized round's manifest, zeros if there is none. `bound` is the norm above
    which contributions were scaled down, None where the method does not; the merged delta was multiplied with
    `step_scale`. `standing` is the evidence against the sites after this round's ratings. `code` names the version of
    the merge's arithmetic.
    """

    format: Literal["swarmchain-manifest/3"] = "swarmchain-manifest/3"
    chain_id: int
    contract: str
    run: int
    round: int
    spec: Digest
    parent: Digest
    previous: Digest
    method: str
    bound: float | None
    step_scale: float
    included: tuple[Included, ...]
    excluded: tuple[Excluded, ...]
    standing: tuple[Standing, ...] = ()
    checkpoint: Digest
    code: str


@dataclass(frozen=True)
class RoundKey:
    """Names one round of one run on one contract of one chain; what a commitment is bound to."""

    chain_id: int
    contract: str
    run: int
    round_id: int


def compute_digest(data: bytes | bytearray | memoryview) -> str:
    """SHA-256 as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def encode_canonical(value: Any) -> bytes:
    """JSON by RFC 8785: one value, one sequence of bytes. Models are encoded with all their fields."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return bytes(rfc8785.dumps(plain))


def compute_commitment(key: RoundKey, site: int, opening: Opening) -> str:
    """Commitment of one site to one contribution, as hex without 0x.

    Keccak-256 over the ABI encoding (one 32-byte word each) of type, chain id, contract, run, round, site index,
    digest, samples, salt: the same as `computeCommitment` in Rounds.sol.
    """
    numbers = [key.chain_id, int(key.contract, 16), key.run, key.round_id, site]
    words = [n.to_bytes(32, "big") for n in numbers]
    words += [bytes.fromhex(opening.digest), opening.samples.to_bytes(32, "big"), bytes.fromhex(opening.salt)]
    return keccak(COMMITMENT_TYPE + b"".join(words)).hex()


def parse_opening(data: bytes) -> Opening:
    """Read what a stranger calls an opening.

    Raises
    ------
    OpeningError
        If it is too long, no JSON, not exactly an opening, or not in canonical form.
    """
    if len(data) > OPENING_BYTES_MAX:
        raise OpeningError(f"an opening of {len(data)} bytes is over the limit of {OPENING_BYTES_MAX}")
    try:
        opening = Opening.model_validate_json(data)
    except ValidationError as exc:
        raise OpeningError(f"not an opening: {first_problem(exc)}") from exc
    if encode_canonical(opening) != data:
        # one content, one sequence of bytes: nothing in it may change unseen
        raise OpeningError("not an opening: it is not canonical JSON")
    return opening


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest from the store; the caller has checked its digest.

    Raises
    ------
    OpeningError
        If it is too long, no JSON, or not exactly a manifest.
    """
    if len(data) > MANIFEST_BYTES_MAX:
        raise OpeningError(f"a manifest of {len(data)} bytes is over the limit of {MANIFEST_BYTES_MAX}")
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as exc:
        raise OpeningError(f"not a manifest: {first_problem(exc)}") from exc


def first_problem(exc: ValidationError) -> str:
    """The first thing that pydantic found wrong, as `key: what`, on one line."""
    error = exc.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in error["loc"]) or "document"
    more = f" (and {exc.error_count() - 1} more)" if exc.error_count() > 1 else ""
    return f"{where}: {error['msg']}{more}".replace("\n", " ")


def mask_to_sites(mask: int) -> frozenset[int]:
    """Site indices whose bit is set."""
    return frozenset(i for i in range(SITES_MAX) if mask >> i & 1)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed for one purpose, from numbers and names; equal on every machine."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 1
