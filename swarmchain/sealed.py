"""A store through the eyes of one site: what it puts there is sealed to the members, what is sealed to it is opened.

It takes a `Store`'s place: contributions and checkpoints are named, asked for and hashed by their plaintext as before.
Specs, openings and manifests stay in the clear: they say who took part with how many cells, which the chain and the
certificates say too, and whoever has not joined yet must be able to read what it would join.

What is read is looked at as it is read: a member whose box is missing or wrong gets the right one, so that a blob that
one member can open all can, and a site that joined reads from its first round on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from swarmchain.checkpoint import Buffer
from swarmchain.errors import (
    BlobMissing,
    CheckpointError,
    ConfigError,
    NotRecipient,
    StoreError,
    StoreUnreachable,
    SwarmError,
)
from swarmchain.keys import SealKey
from swarmchain.protocol import Digest, RoundKey, Strict, compute_digest, encode_canonical, first_problem
from swarmchain.sealing import (
    ENVELOPE_BYTES_MAX,
    RECIPIENTS_MAX,
    Envelope,
    address,
    compute_sealed_size,
    encode_envelope,
    find_wrong,
    is_usable,
    parse_envelope,
    require_envelope_size,
    seal,
    seal_to,
    unseal,
)
from swarmchain.store import Store

DISCLOSURE_BYTES_MAX = 16 << 20


class _Opening(Store):
    """Reads sealed blobs over another store's connection, however it comes by their content keys."""

    def __init__(self, inner: Store) -> None:
        self.__dict__.update(inner.__dict__)
        self._inner = inner

    @property
    def bytes_up(self) -> int:
        """What went up through `inner` and all its views: an agent has one view for each run, and one connection."""
        return self._inner.bytes_up

    @bytes_up.setter
    def bytes_up(self, value: int) -> None:
        self._inner.bytes_up = value

    @property
    def bytes_down(self) -> int:
        """What came down, likewise."""
        return self._inner.bytes_down

    @bytes_down.setter
    def bytes_down(self, value: int) -> None:
        self._inner.bytes_down = value

    def has_blob(self, digest: str) -> bool:
        """Whether a blob of this plaintext digest is there, sealed or not; its content is checked on reading only."""
        return self.has_envelope(digest) or super().has_blob(digest)

    def get_blob(self, digest: str, *, bytes_max: int) -> bytes:
        """Fetch a blob, sealed or not, and hash its plaintext. Raises as `Store.get_blob` does, or `NotRecipient`."""
        with suppress(BlobMissing):
            return super().get_blob(digest, bytes_max=bytes_max)
        envelope = self._read_envelope(digest)
        if envelope.size > bytes_max:
            raise StoreError(f"blob {digest[:12]}… is longer than the {bytes_max} bytes it may have")
        data = bytearray(envelope.size)
        self._open(envelope, memoryview(data))
        return bytes(data)

    def read_blob(self, digest: str, into: memoryview) -> None:
        """Fetch a blob of exactly the size of `into`. Raises as `Store.read_blob` does, or `NotRecipient`."""
        try:
            envelope = self._read_envelope(digest)
        except BlobMissing:
            super().read_blob(digest, into)
            return
        require_envelope_size(envelope, len(into))
        self._open(envelope, into)

    def require_whole(self, digest: str) -> None:
        """Raises `StoreError` unless a blob is there and whole: its plaintext, or what lies under its own name."""
        with suppress(BlobMissing):
            super().require_whole(digest)
            return
        envelope = self._read_envelope(digest)
        self._open(envelope, memoryview(bytearray(envelope.size)))

    def _get_content_key(self, envelope: Envelope) -> bytes:
        raise NotImplementedError

    def _open(self, envelope: Envelope, into: memoryview) -> bytes:
        content_key = self._get_content_key(envelope)
        pieces = self.stream_blob(envelope.ciphertext, compute_sealed_size(envelope.size))
        try:
            unseal(pieces, content_key, digest=envelope.plaintext, into=into)
        except CheckpointError as exc:
            raise StoreError(f"sealed blob {envelope.plaintext[:12]}… is not as long as its envelope says") from exc
        return content_key

    def _read_envelope(self, digest: str) -> Envelope:
        return parse_envelope(self.get_envelope(digest, bytes_max=ENVELOPE_BYTES_MAX), digest)


class SealedStore(_Opening):
    """A member's view.

    Parameters
    ----------
    key
        Opens, and seals; a site's own.
    context
        Names the contract, so that no key is used in two places.
    members
        Public keys (hex) that are to read what is put from now on. Asked each time: members come and go. Keys that are
        none are passed over: a site that publishes one harms only itself.
    """

    def __init__(self, inner: Store, key: SealKey, *, context: str, members: Callable[[], Collection[str]]) -> None:
        super().__init__(inner)
        self._key = key
        self._context = context
        self._members = members

    def put_blob(self, data: Buffer, *, digest: str = "") -> str:
        """Seal `data` to the members, once; return the digest of the plaintext."""
        digest = digest or compute_digest(data)
        if not self.has_blob(digest):
            self._seal(data, digest)
        return digest

    def put_public(self, data: Buffer) -> str:
        """Store `data` in the clear, once: a spec or a manifest."""
        return Store.put_blob(self, data)

    def restore_public(self, data: Buffer) -> str:
        """As `Store.restore_blob`: in the clear."""
        return Store.restore_blob(self, data)

    def restore_blob(self, data: Buffer, *, digest: str = "") -> str:
        """Seal `data` even where something else lies in its place."""
        digest = digest or compute_digest(data)
        try:
            self.read_blob(digest, memoryview(bytearray(len(data))))
        except StoreUnreachable:
            raise
        except SwarmError:
            self._seal(data, digest)
        return digest

    def welcome(self, digest: str, *, also: Collection[str] = ()) -> None:
        """See that every member, and whoever has one of the keys `also`, can open a blob that this site can open.

        Raises
        ------
        StoreError
            If this site cannot, or the blob is not there.
        """
        envelope = self._read_envelope(digest)
        self._put_right(envelope, self._get_content_key(envelope), also={key for key in also if is_usable(key)})

    def disclose(self, digests: Iterable[str], run: RoundKey, *, to: str) -> bytes:
        """Content keys of sealed blobs of one run, sealed to an auditor's public key (hex); see `DisclosedStore`.

        Raises
        ------
        StoreError
            If this site cannot open one of them, or `to` is no key. Blobs that are not there are left out.
        """
        keys: dict[str, str] = {}
        for digest in digests:
            with suppress(BlobMissing):
                envelope = self._read_envelope(digest)
                keys[digest] = self._get_content_key(envelope).hex()
        found = Disclosure(chain_id=run.chain_id, contract=run.contract.lower(), run=run.run, keys=keys)
        return seal_to(encode_canonical(found), to)

    def _get_content_key(self, envelope: Envelope) -> bytes:
        return self._key.open_box(envelope)

    def _open(self, envelope: Envelope, into: memoryview) -> bytes:
        content_key = super()._open(envelope, into)
        # to help others must not keep this site from reading
        with suppress(SwarmError):
            self._put_right(envelope, content_key)
        return content_key

    def _seal(self, data: Buffer, digest: str) -> None:
        """The ciphertext first: an envelope that speaks of nothing would be taken for a spoilt blob."""
        content_key = self._key.derive_content_key(self._context, digest)
        ciphertext = seal(data, content_key, digest=digest)
        named = compute_digest(ciphertext)
        Store.restore_blob(self, ciphertext, digest=named)
        boxes = address(content_key, {*self._find_members(), self._key.public})
        self._put_envelope(Envelope(plaintext=digest, size=len(data), ciphertext=named, boxes=boxes))

    def _find_members(self) -> set[str]:
        return {key for key in self._members() if is_usable(key)}

    def _put_right(self, envelope: Envelope, content_key: bytes, *, also: Collection[str] = ()) -> None:
        """Give members whose box is missing or wrong the right one; boxes of others stay as they are."""
        wrong = find_wrong(envelope, content_key, {*self._find_members(), *also})
        if not wrong:
            return
        kept = [box for box in envelope.boxes if box.key not in wrong][: RECIPIENTS_MAX - len(wrong)]
        boxes = sorted([*kept, *address(content_key, wrong)], key=lambda box: box.key)
        self._put_envelope(envelope.model_copy(update={"boxes": tuple(boxes)}))

    def _put_envelope(self, envelope: Envelope) -> None:
        self.put_envelope(envelope.plaintext, encode_envelope(envelope))


class Disclosure(Strict):
    """What an auditor is given: the content keys of one run's blobs, by plaintext digest."""

    format: Literal["swarmchain-disclosure/1"] = "swarmchain-disclosure/1"
    chain_id: int
    contract: Annotated[str, Field(pattern=r"^0x[0-9a-f]{40}$")]
    run: int
    keys: Annotated[dict[Digest, Digest], Field(max_length=1_000_000)]


class DisclosedStore(_Opening):
    """An auditor's view: it opens what was disclosed, and writes nothing."""

    def __init__(self, inner: Store, keys: Mapping[str, str]) -> None:
        super().__init__(inner)
        self._keys = keys

    def _get_content_key(self, envelope: Envelope) -> bytes:
        if envelope.plaintext not in self._keys:
            raise NotRecipient(f"blob {envelope.plaintext[:12]}… is sealed, and its key was not disclosed",
                               hint="ask a site for the run's keys: `swarmchain run disclose`")
        return bytes.fromhex(self._keys[envelope.plaintext])


def open_disclosure(data: bytes, key: SealKey, run: RoundKey) -> Disclosure:
    """Read what a site disclosed to this key.

    Raises
    ------
    KeystoreError
        If it is sealed to another key.
    ConfigError
        If it is no disclosure, or another run's.
    """
    if len(data) > DISCLOSURE_BYTES_MAX:
        raise ConfigError(f"a disclosure of {len(data)} bytes is over the limit of {DISCLOSURE_BYTES_MAX}")
    try:
        found = Disclosure.model_validate_json(key.open_sealed(data))
    except ValidationError as exc:
        raise ConfigError(f"this is no disclosure: {first_problem(exc)}", hint="ask for it again") from exc
    if (found.chain_id, found.contract, found.run) != (run.chain_id, run.contract.lower(), run.run):
        raise ConfigError(f"this discloses run {found.run} of the contract {found.contract}, not run {run.run}",
                          hint="ask for the right one")
    return found
