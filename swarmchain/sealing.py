"""Blobs that only their recipients read: an envelope, and a ciphertext in chunks.

A blob is encrypted once, under a content key of its own, with XChaCha20-Poly1305 in chunks of 1 MiB that bear their
number and whether they are the last (the STREAM construction; Hoang, Reyhanitabar, Rogaway, Vizár 2015), so that it
streams, and no chunk can be moved, left out or cut off. The envelope names the plaintext by its digest and the
ciphertext by its own, and holds the content key once for each recipient, in a box that only its X25519 key opens.

A box's one-time key pair is derived from the content key and the recipient, as Fujisaki and Okamoto (1999) do: the
boxes are those of libsodium's `crypto_box_seal`, but whoever reads the blob can make every other recipient's box again
and see that it is the right one. So nobody can seal to some members and, unseen, not to others.

What the digest of the plaintext does not say is not believed: whoever writes to the store may write an envelope.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, Self

from nacl import bindings
from nacl.exceptions import CryptoError
from nacl.exceptions import TypeError as NaclTypeError
from nacl.exceptions import ValueError as NaclValueError
from pydantic import Field, ValidationError, model_validator

from swarmchain.errors import CheckpointError, NotRecipient, StoreError
from swarmchain.protocol import Digest, Strict, encode_canonical, first_problem

# as in `checkpoint`, which takes numpy: whoever only opens a key must not wait for it
Buffer = bytes | bytearray | memoryview
CHUNK = 1 << 20
TAG = 16
KEY_BYTES = 32
RECIPIENTS_MAX = 512  # every site that a contract holds, and as many auditors
ENVELOPE_BYTES_MAX = 192 << 10
SIZE_MAX = 1 << 46


class Box(Strict):
    """The content key for one recipient, named by its public key."""

    key: Digest
    sealed: Annotated[str, Field(pattern=r"^[0-9a-f]{160}$")]


class Envelope(Strict):
    """What lies under a sealed blob's plaintext digest. Boxes stand in the order of their keys, each key once."""

    format: Literal["swarmchain-sealed/1"] = "swarmchain-sealed/1"
    plaintext: Digest
    size: Annotated[int, Field(ge=0, le=SIZE_MAX)]
    ciphertext: Digest
    boxes: Annotated[tuple[Box, ...], Field(min_length=1, max_length=RECIPIENTS_MAX)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        keys = [box.key for box in self.boxes]
        if keys != sorted(set(keys)):
            raise ValueError("the boxes are not in the order of their keys")
        return self


def compute_sealed_size(size: int) -> int:
    """Bytes of the ciphertext of a blob of `size` bytes: 16 more for each chunk, and there is at least one."""
    return size + TAG * _count_chunks(size)


def seal(plaintext: Buffer, content_key: bytes, *, digest: str) -> bytearray:
    """The ciphertext. The same key must never be used for another plaintext: derive it from `digest`."""
    view, size = memoryview(plaintext), len(plaintext)
    about, count = _describe(digest, size), _count_chunks(size)
    sealed = bytearray(compute_sealed_size(size))
    at = 0
    for number in range(count):
        chunk = bytes(view[number * CHUNK : (number + 1) * CHUNK])
        made = bindings.crypto_aead_xchacha20poly1305_ietf_encrypt(chunk, about, _nonce(number, count), content_key)
        sealed[at : at + len(made)] = made
        at += len(made)
    return sealed


def unseal(pieces: Iterable[Buffer], content_key: bytes, *, digest: str, into: memoryview) -> None:
    """Decrypt a ciphertext that comes in pieces of any length, and see that the plaintext is what its name says.

    Raises
    ------
    StoreError
        If it is not the ciphertext of a blob of this digest and of the size of `into`; `into` may then hold a part.
    """
    about, count, sha = _describe(digest, len(into)), _count_chunks(len(into)), hashlib.sha256()
    sizes = [min(CHUNK, len(into) - start) + TAG for start in range(0, max(1, len(into)), CHUNK)]
    at = 0
    for number, frame in enumerate(_cut(pieces, sizes, digest)):
        try:
            chunk = bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(
                frame, about, _nonce(number, count), content_key)
        except CryptoError as exc:
            raise _altered(digest) from exc
        into[at : at + len(chunk)] = chunk
        sha.update(chunk)
        at += len(chunk)
    if sha.hexdigest() != digest:
        raise _altered(digest)


def address(content_key: bytes, keys: Iterable[str]) -> tuple[Box, ...]:
    """The content key in a box for each of these public keys (hex), the same boxes each time.

    Raises
    ------
    StoreError
        If one of them is no X25519 key.
    """
    return tuple(Box(key=key, sealed=_make_box(content_key, bytes.fromhex(key)).hex()) for key in sorted(set(keys)))


def find_wrong(envelope: Envelope, content_key: bytes, keys: Iterable[str]) -> set[str]:
    """Of these recipients, those that have no box in the envelope, or one that does not hold its content key."""
    found = {box.key: box for box in envelope.boxes}
    return {box.key for box in address(content_key, keys) if found.get(box.key) != box}


def open_box(envelope: Envelope, key: str, secret: bytes) -> bytes:
    """The content key, by a recipient's public key (hex) and its secret.

    Raises
    ------
    NotRecipient
        If there is no box for this key, or it holds something else.
    """
    box = next((box for box in envelope.boxes if box.key == key), None)
    if box is None:
        raise NotRecipient(f"blob {envelope.plaintext[:12]}… is not sealed to the key {key[:12]}… (yet)",
                           hint="the agent of any site that reads it seals it to new members when it next looks")
    try:
        content_key: bytes = bindings.crypto_box_seal_open(bytes.fromhex(box.sealed), bytes.fromhex(key), secret)
    except CryptoError as exc:
        content_key = b""
        problem: CryptoError | None = exc
    else:
        problem = None
    if len(content_key) != KEY_BYTES:
        raise NotRecipient(f"the box for the key {key[:12]}… of blob {envelope.plaintext[:12]}… does not open",
                           hint="the agent of any site that reads it puts it right when it next looks") from problem
    return content_key


def is_usable(key: str) -> bool:
    """Whether something can be sealed to this public key (hex)."""
    try:
        _make_box(bytes(KEY_BYTES), bytes.fromhex(key))
    except (StoreError, ValueError):
        return False
    return True


def seal_to(data: bytes, key: str) -> bytes:
    """Data in a sealed box (libsodium's) for one public key (hex). Raises `StoreError` if that is none."""
    if not is_usable(key):
        raise StoreError(f"{key[:12]!r}… is no X25519 key", hint="64 hex digits, as its owner's tools print them")
    sealed: bytes = bindings.crypto_box_seal(data, bytes.fromhex(key))
    return sealed


def derive_content_key(secret: bytes, context: str, digest: str) -> bytes:
    """A content key for one blob in one place, from a site's X25519 secret: HMAC-SHA256, the same each time.

    So an upload that broke off goes on with the same bytes, and two blobs never share a key.
    """
    return hmac.new(secret, f"swarmchain.content.v1\0{context}\0{digest}".encode(), hashlib.sha256).digest()


def encode_envelope(envelope: Envelope) -> bytes:
    """Canonical bytes."""
    return encode_canonical(envelope)


def parse_envelope(data: bytes, digest: str) -> Envelope:
    """Read what a stranger says lies sealed under `digest`.

    Raises
    ------
    StoreError
        If it is too long, no envelope, not in canonical form, or another blob's.
    """
    if len(data) > ENVELOPE_BYTES_MAX:
        raise StoreError(f"an envelope of {len(data)} bytes is over the limit of {ENVELOPE_BYTES_MAX}")
    try:
        envelope = Envelope.model_validate_json(data)
    except ValidationError as exc:
        raise StoreError(f"the envelope of blob {digest[:12]}… is none: {first_problem(exc)}") from exc
    if envelope.plaintext != digest or encode_envelope(envelope) != data:
        raise StoreError(f"the envelope of blob {digest[:12]}… is another blob's, or not canonical JSON")
    return envelope


def require_envelope_size(envelope: Envelope, size: int) -> None:
    """Raises `CheckpointError` if a sealed blob has another size than the spec prescribes."""
    if envelope.size != size:
        raise CheckpointError(
            f"blob {envelope.plaintext[:12]}…: {envelope.size} bytes where the spec prescribes {size}")


def _make_box(content_key: bytes, key: bytes) -> bytes:
    one_time = hmac.new(content_key, b"swarmchain.box.v1\0" + key, hashlib.sha256).digest()
    try:
        public = bindings.crypto_scalarmult_base(one_time)
        nonce = hashlib.blake2b(public + key, digest_size=bindings.crypto_box_NONCEBYTES).digest()
        box: bytes = public + bindings.crypto_box(content_key, nonce, key, one_time)
    except (CryptoError, NaclTypeError, NaclValueError, RuntimeError) as exc:
        raise StoreError(f"{key.hex()[:12]}… is no X25519 key", hint="its site sets another with `setSealKey`") from exc
    return box


def _cut(pieces: Iterable[Buffer], sizes: list[int], digest: str) -> Iterator[bytes]:
    """Frames of exactly these sizes; raises `StoreError` if there are fewer bytes, or more."""
    held, left = bytearray(), iter(sizes)
    want = next(left, None)
    for piece in pieces:
        held += piece
        while want is not None and len(held) >= want:
            yield bytes(held[:want])
            del held[:want]
            want = next(left, None)
        if want is None and held:
            raise _altered(digest)
    if want is not None:
        raise _altered(digest)


def _count_chunks(size: int) -> int:
    return max(1, -(-size // CHUNK))


def _nonce(number: int, count: int) -> bytes:
    return number.to_bytes(23, "big") + bytes([number == count - 1])


def _describe(digest: str, size: int) -> bytes:
    """What every chunk is bound to."""
    return b"swarmchain-sealed/1\0" + bytes.fromhex(digest) + size.to_bytes(8, "big")


def _altered(digest: str) -> StoreError:
    return StoreError(f"sealed blob {digest[:12]}… is not what its name says",
                      hint="somebody altered it or a write broke off: a site that holds it will put it back")
