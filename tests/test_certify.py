"""What strangers put into the store: nothing invalid counts, nothing ends the reader, each refusal has its reason."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from merges import draw

from swarmchain.certify import Gathered, certify, gather_many, gather_one
from swarmchain.checkpoint import allocate_tensors, decode_tensors, encode_tensors
from swarmchain.codec import encode_deltas
from swarmchain.errors import CheckpointError, OpeningError
from swarmchain.layouts import Layout, contribution_layout, parameter_layout
from swarmchain.merging import CODECS
from swarmchain.protocol import (
    Excluded,
    Manifest,
    Opening,
    RoundKey,
    compute_commitment,
    compute_digest,
    encode_canonical,
    parse_manifest,
    parse_opening,
)
from swarmchain.spec import Limits, RehearsalSpec
from swarmchain.spool import Spool
from swarmchain.store import Store

KEY = RoundKey(31337, "0x" + "ab" * 20, 1, 1)
LIMITS = Limits(rounds=1, sites_to_start=1)
FUZZED = 12_000


def make_spec(**changes: Any) -> RehearsalSpec:
    return RehearsalSpec(name="r", widths=(5, 3), limits=LIMITS, **changes)


def make_blob(spec: RehearsalSpec, site: int = 0) -> bytes:
    deltas = {name: draw(site, shape) for name, (_, shape) in parameter_layout(spec).items()}
    return encode_tensors(encode_deltas(deltas, spec.codec)[0], contribution_layout(spec))


class Round:
    """A store, and one site's commitment to `data` in it."""

    def __init__(self, folder: Path, spec: RehearsalSpec, data: bytes) -> None:
        self.folder, self.layout = folder, contribution_layout(spec)
        self.store, self.spool = Store(str(folder)), Spool(folder / "spool")
        self.opening = Opening(digest=compute_digest(data), samples=10, nonce="12" * 32)
        self.commitment = compute_commitment(KEY, 0, self.opening)
        self.store.put_blob(data)
        self.store.put_opening(self.commitment, encode_canonical(self.opening))
        self.blob_path = folder / "blobs" / self.opening.digest[:2] / self.opening.digest
        self.opening_path = folder / "openings" / self.commitment

    def gather(self) -> Any:
        return gather_one(self.store, self.spool, self.commitment, self.layout, key=KEY, site=0)


@pytest.mark.parametrize("codec", CODECS)
def test_good_contribution_is_gathered(tmp_path: Path, codec: str) -> None:
    spec = make_spec(codec=codec)
    found = Round(tmp_path, spec, make_blob(spec)).gather()
    assert isinstance(found, Gathered) and found.contribution.norm > 0


def test_of_many_each_is_judged_by_itself(tmp_path: Path) -> None:
    """Fetched side by side: what is wrong with some says nothing of the others, and all come to lie in their places."""
    spec = make_spec()
    layout, store, commitments = contribution_layout(spec), Store(str(tmp_path)), {}
    for site in range(12):
        data = make_blob(spec, site)
        opening = Opening(digest=compute_digest(data), samples=10 + site, nonce="12" * 32)
        commitments[site] = compute_commitment(KEY, site, opening)
        path = tmp_path / "blobs" / opening.digest[:2] / opening.digest
        if site != 3:
            store.put_blob(data)
        if site != 5:
            store.put_opening(commitments[site], encode_canonical(opening))
        if site == 7:
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        elif site == 8:
            path.write_bytes(data + b"more")
        elif site == 9:
            (tmp_path / "openings" / commitments[site]).write_bytes(b"{}")
    found = gather_many(store, Spool(tmp_path / "spool"), commitments, layout, key=KEY)
    assert {site: answer for site, answer in found.items() if not isinstance(answer, Gathered)} == {
        3: "withheld", 5: "withheld", 7: "blob altered", 8: "blob malformed", 9: "opening invalid"}
    for site, answer in found.items():
        if isinstance(answer, Gathered):
            assert answer.opening.samples == 10 + site
            expected = decode_tensors(make_blob(spec, site), layout)
            assert all(answer.contribution.tensors[name].tobytes() == expected[name].tobytes() for name in expected)


def spoil(data: bytes, kind: str, spec: RehearsalSpec) -> bytes:
    layout = contribution_layout(spec)
    tensors = {name: array.copy() for name, array in decode_tensors(data, layout).items()}
    name = next(n for n in tensors if tensors[n].dtype == np.float32)
    if kind == "shape":
        other = {**layout, name: ("float32", (2, *layout[name][1]))}
        return encode_tensors({**tensors, name: np.zeros(other[name][1], np.float32)}, other)
    if kind == "names":
        return encode_tensors({"x" + n: a for n, a in tensors.items()}, {"x" + n: e for n, e in layout.items()})
    tensors[name].reshape(-1)[0] = {"nan": np.nan, "infinity": -np.inf}[kind]
    out, views = allocate_tensors(layout)
    for n, array in tensors.items():
        views[n][...] = array
    return bytes(out)


@pytest.mark.parametrize("codec", ["float32", "int8"])
@pytest.mark.parametrize(("kind", "reason"), [
    ("shape", "blob malformed"), ("names", "blob malformed"), ("nan", "not finite"), ("infinity", "not finite")])
def test_committed_nonsense_is_refused_with_its_reason(tmp_path: Path, codec: str, kind: str, reason: str) -> None:
    spec = make_spec(codec=codec)
    assert Round(tmp_path, spec, spoil(make_blob(spec), kind, spec)).gather() == reason


def test_float16_infinity_is_refused(tmp_path: Path) -> None:
    spec = make_spec(codec="float16")
    data, views = allocate_tensors(contribution_layout(spec))
    next(iter(views.values())).reshape(-1)[0] = np.inf
    assert Round(tmp_path, spec, bytes(data)).gather() == "not finite"


def test_statistics_that_are_infinite_are_refused(tmp_path: Path) -> None:
    layout: Layout = {"sum": ("float64", (3,)), "cells_per_label": ("int64", (2,))}
    data, views = allocate_tensors(layout)
    views["sum"][1] = np.inf
    found = Round(tmp_path, make_spec(), bytes(data))
    found.layout = layout
    assert found.gather() == "not finite"


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One of the things that happen to bytes: flipped, cut, grown, replaced, copied about."""
    found = bytearray(data)
    kind = chance.randrange(6)
    at = chance.randrange(len(found))
    if kind == 0:
        found[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del found[at:]
    elif kind == 2:
        found += chance.randbytes(chance.randrange(1, 64))
    elif kind == 3:
        found[at : at + 8] = chance.randbytes(8)
    elif kind == 4:
        found = bytearray(chance.randbytes(chance.randrange(2 * len(found))))
    else:
        found[at:at] = found[: chance.randrange(1, len(found))]
    return bytes(found)


def test_fuzzed_blobs_and_openings_are_refused_with_a_reason(tmp_path: Path) -> None:
    chance = random.Random(5)
    spec = make_spec()
    found = Round(tmp_path, spec, make_blob(spec))
    reasons: dict[str, set[str]] = {"blob": set(), "opening": set()}
    for name, path in (("blob", found.blob_path), ("opening", found.opening_path)):
        good = path.read_bytes()
        for _ in range(FUZZED // 4):
            data = mutate(good, chance)
            path.write_bytes(data)
            answer = found.gather()
            assert isinstance(answer, str) != (data == good), data
            reasons[name].add(str(answer) if isinstance(answer, str) else "")
        path.write_bytes(good)
    assert reasons["blob"] - {""} == {"blob altered", "blob malformed"}
    assert reasons["opening"] - {""} == {"opening invalid"}
    certified = certify(spec, ("0" * 64, {n: np.zeros(s, np.float32) for n, (_, s) in parameter_layout(spec).items()}),
                        ([found.gather()], [Excluded(site=1, commitment="1" * 64, reason="blob altered")]),
                        key=KEY, spec_digest="2" * 64, rejections=0)
    assert parse_manifest(certified.manifest_bytes).excluded[0].reason == "blob altered"


def test_fuzzed_contributions_that_were_committed_to_are_refused(tmp_path: Path) -> None:
    """The hostile site commits to exactly these bytes, so that their digest is right."""
    chance = random.Random(6)
    layout = contribution_layout(make_spec())
    good = make_blob(make_spec())
    header = len(good) - sum(4 * int(np.prod(shape)) for _, shape in layout.values())
    refused = 0
    for _ in range(FUZZED // 4):
        data = mutate(good, chance)
        try:
            decode_tensors(data, layout)
        except CheckpointError as exc:
            refused += 1
            assert "\n" not in exc.message
        else:
            # other numbers, and nothing else: that is what a hostile site may say, and what the method is there for
            assert len(data) == len(good) and data[:header] == good[:header]
    assert refused > FUZZED // 8


def make_manifest() -> Manifest:
    return Manifest(chain_id=1, contract="0x" + "ab" * 20, run=1, round=1, spec="0" * 64, parent="0" * 64,
                    previous="0" * 64, method="mean", bound=None, step_scale=1.0, included=(), excluded=(),
                    checkpoint="0" * 64, code="c")


def test_fuzzed_manifests_are_refused_or_say_the_same() -> None:
    chance = random.Random(7)
    good = encode_canonical(make_manifest())
    for _ in range(FUZZED // 4):
        data = mutate(good, chance)
        try:
            found = parse_manifest(data)
        except OpeningError as exc:
            assert "\n" not in exc.message
        else:
            assert isinstance(found, Manifest)  # another certificate; its digest is not the one on chain


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
                    max_leaves=12)


@pytest.mark.parametrize(("parse", "good"), [
    (parse_opening, json.loads(encode_canonical(Opening(digest="0" * 64, samples=1, nonce="0" * 64)))),
    (parse_manifest, json.loads(encode_canonical(make_manifest())))], ids=["opening", "manifest"])
@given(value=JSON, data=st.data())
def test_invalid_json_in_any_field(parse: Any, good: dict[str, Any], value: Any, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([*good, "more", ""]))
    changed = value if not key else {**good, key: value}
    text = json.dumps(changed).encode()
    try:
        found = parse(text)
    except OpeningError as exc:
        assert "\n" not in exc.message
    else:
        # whatever is accepted is written back as it was read, to the last key
        assert json.loads(encode_canonical(found)) == json.loads(json.dumps({**good, **changed}))
