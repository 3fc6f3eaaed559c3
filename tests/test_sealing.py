"""Sealed blobs: only recipients read them, nothing changes unseen, and a stranger's envelope is not believed."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.public import PrivateKey, PublicKey, SealedBox

from swarmchain import sealing
from swarmchain.errors import CheckpointError, NotRecipient, StoreError
from swarmchain.protocol import compute_digest
from swarmchain.sealing import (
    CHUNK,
    TAG,
    Envelope,
    address,
    compute_sealed_size,
    derive_content_key,
    encode_envelope,
    find_wrong,
    open_box,
    parse_envelope,
    require_envelope_size,
    seal,
    unseal,
)

SECRETS = [PrivateKey(bytes([i + 1]) * 32) for i in range(4)]
KEYS = [bytes(secret.public_key).hex() for secret in SECRETS]
ZERO = "0" * 64
SIZES = st.sampled_from([0, 1, 17, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])


def make(size: int, seed: int = 0) -> tuple[bytes, str, bytes, bytes]:
    data = Random(seed).randbytes(size)
    digest = compute_digest(data)
    key = derive_content_key(b"s" * 32, "31337-0x11", digest)
    return data, digest, key, bytes(seal(data, key, digest=digest))


def open_up(sealed: list[bytes], key: bytes, digest: str, size: int) -> bytes:
    room = memoryview(bytearray(size))
    unseal(sealed, key, digest=digest, into=room)
    return bytes(room)


def make_envelope(keys: list[str]) -> tuple[Envelope, bytes]:
    data, digest, key, sealed = make(100)
    return Envelope(plaintext=digest, size=len(data), ciphertext=compute_digest(sealed), boxes=address(key, keys)), key


@settings(max_examples=30)
@given(SIZES, st.lists(st.integers(1, CHUNK), max_size=6), st.integers(0, 5))
def test_sealing_round_trip_in_pieces_of_any_length(size: int, cuts: list[int], seed: int) -> None:
    data, digest, key, sealed = make(size, seed)
    assert len(sealed) == compute_sealed_size(size) and (size < 16 or data[:16] not in sealed)
    pieces, at = [], 0
    for cut in [*cuts, len(sealed)]:
        pieces.append(sealed[at : at + cut])
        at += cut
    assert open_up([*pieces, sealed[at:]] if at < len(sealed) else pieces, key, digest, size) == data


@settings(max_examples=30)
@given(SIZES, st.data())
def test_invalid_sealed_blob_with_any_bit_flipped_cut_or_moved(size: int, draw: st.DataObject) -> None:
    _, digest, key, sealed = make(size)
    bit = draw.draw(st.integers(0, 8 * len(sealed) - 1))
    flipped = bytearray(sealed)
    flipped[bit // 8] ^= 1 << bit % 8
    cut = draw.draw(st.integers(0, len(sealed) - 1))
    frame = CHUNK + TAG
    moved = sealed[frame:] + sealed[:frame]
    for spoilt in (bytes(flipped), sealed[:cut], sealed + b"\0", sealed[:frame], moved):
        if spoilt != sealed:
            with pytest.raises(StoreError, match="not what its name says"):
                open_up([spoilt], key, digest, size)
    for wrong_key, wrong_digest, wrong_size in ((b"k" * 32, digest, size), (key, ZERO, size), (key, digest, size + 1)):
        with pytest.raises(StoreError, match="not what its name says"):
            open_up([sealed], wrong_key, wrong_digest, wrong_size)


def test_plaintext_must_be_what_the_digest_says_even_if_the_sealer_lies() -> None:
    sealed = seal(b"something else", b"k" * 32, digest=ZERO)
    with pytest.raises(StoreError, match="not what its name says"):
        open_up([bytes(sealed)], b"k" * 32, ZERO, 14)


def test_recipients_read_and_nobody_else() -> None:
    envelope, key = make_envelope(KEYS[:3])
    for secret, public in zip(SECRETS[:3], KEYS[:3], strict=True):
        assert open_box(envelope, public, bytes(secret)) == key
    with pytest.raises(NotRecipient, match="not sealed to"):
        open_box(envelope, KEYS[3], bytes(SECRETS[3]))
    with pytest.raises(NotRecipient, match="does not open"):
        open_box(envelope, KEYS[0], bytes(SECRETS[3]))
    # the boxes are libsodium's own
    assert SealedBox(SECRETS[0]).decrypt(bytes.fromhex(next(b.sealed for b in envelope.boxes if b.key == KEYS[0]))) \
        == key


def test_whoever_reads_sees_that_another_recipients_box_is_wrong() -> None:
    envelope, key = make_envelope(KEYS[:3])
    assert find_wrong(envelope, key, KEYS[:3]) == set() and find_wrong(envelope, key, KEYS) == {KEYS[3]}
    for lie in (SealedBox(PublicKey(bytes.fromhex(KEYS[1]))).encrypt(b"x" * 32).hex(), "00" * 80):
        boxes = tuple(box.model_copy(update={"sealed": lie}) if box.key == KEYS[1] else box for box in envelope.boxes)
        spoilt = envelope.model_copy(update={"boxes": boxes})
        assert find_wrong(spoilt, key, KEYS[:3]) == {KEYS[1]}
        try:  # its recipient gets nothing, or a key that opens nothing
            assert open_box(spoilt, KEYS[1], bytes(SECRETS[1])) != key
        except NotRecipient as exc:
            assert "does not open" in exc.message


def test_sealing_again_gives_the_same_bytes_and_another_place_another_key() -> None:
    assert make_envelope(KEYS) == make_envelope(KEYS[::-1])
    keys = {derive_content_key(secret, context, digest) for secret in (b"a" * 32, b"b" * 32)
            for context in ("1-0x1", "1-0x2") for digest in (ZERO, "1" * 64)}
    assert len(keys) == 8


def test_invalid_envelope() -> None:
    envelope, _ = make_envelope(KEYS[:2])
    digest, data = envelope.plaintext, encode_envelope(envelope)
    assert parse_envelope(data, digest) == envelope
    fields = json.loads(data)
    spoilt = [b"", b"[" * 10_000, data[:-1], data + b" ", json.dumps(fields).encode(), b"x" * (200 << 10),
              *(json.dumps({**fields, **change}, separators=(",", ":"), sort_keys=True).encode() for change in (
                  {"more": 1}, {"size": -1}, {"size": 1 << 60}, {"size": "1"}, {"boxes": []}, {"format": "sealed/9"},
                  {"boxes": fields["boxes"][::-1]}, {"boxes": [fields["boxes"][0]] * 2}, {"ciphertext": "../x"}))]
    for text in spoilt:
        with pytest.raises(StoreError) as caught:
            parse_envelope(text, digest)
        assert "\n" not in caught.value.message
    with pytest.raises(StoreError, match="another blob"):
        parse_envelope(data, ZERO)
    with pytest.raises(CheckpointError, match="prescribes 99"):
        require_envelope_size(envelope, 99)


@pytest.mark.parametrize("key", ["00" * 32, "01" + "00" * 31])
def test_invalid_public_key_of_low_order_is_refused(key: str) -> None:
    with pytest.raises(StoreError, match="no X25519 key"):
        address(b"k" * 32, [key])


@given(st.binary(max_size=300))
def test_invalid_bytes_are_never_an_envelope(data: bytes) -> None:
    with pytest.raises(StoreError):
        parse_envelope(data, ZERO)


def test_envelope_of_a_full_contract_fits_its_limit() -> None:
    key = b"k" * 32
    keys = [bytes(PrivateKey(i.to_bytes(32, "big")).public_key).hex() for i in range(1, sealing.RECIPIENTS_MAX + 1)]
    envelope = Envelope(plaintext=ZERO, size=sealing.SIZE_MAX, ciphertext=ZERO, boxes=address(key, keys))
    assert len(encode_envelope(envelope)) <= sealing.ENVELOPE_BYTES_MAX
