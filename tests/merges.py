"""Made-up contributions, and the digests of every method's merge of them: `python tests/merges.py [--small]`.

All numbers come from raw bits, so that they are the same on every machine.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from swarmchain.checkpoint import allocate_tensors
from swarmchain.codec import encode_deltas
from swarmchain.layouts import Layout, outer_layout
from swarmchain.merge import Input, compute_norm, merge_deltas
from swarmchain.merging import CODECS, Codec, Merge, Outer
from swarmchain.methods import METHODS
from swarmchain.protocol import compute_digest
from swarmchain.spec import RehearsalSpec

SHAPES: dict[str, tuple[int, ...]] = {"a": (257, 129), "b": (7,), "c": (70_001,)}
PARAMETERS: Layout = {name: ("float32", shape) for name, shape in SHAPES.items()}
OUTERS = ("none", "momentum", "nesterov", "fedadam")


def draw(seed: int, shape: tuple[int, ...], *, scale: float = 1.0) -> np.ndarray:
    """Float32 in ±scale/2."""
    words = np.random.PCG64(seed).random_raw(int(np.prod(shape))) >> np.uint64(40)
    return ((words.astype(np.float32) * np.float32(2**-24) - np.float32(0.5)) * np.float32(scale)).reshape(shape)


def make_input(site: int, deltas: dict[str, np.ndarray], *, samples: int = 100, codec: Codec = "float32") -> Input:
    coded, _ = encode_deltas(deltas, codec)
    return Input(site, samples, coded, compute_norm(coded))


def make_inputs(n: int, *, codec: Codec = "float32", shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[Input]:
    return [make_input(i, {name: draw(1000 * i + k, shape, scale=i + 1) for k, (name, shape) in
                           enumerate(shapes.items())}, samples=10 + 7 * i, codec=codec) for i in range(n)]


def make_settings(method: str, **changes: Any) -> Merge:
    spec = RehearsalSpec.model_validate({"name": "m", "widths": (1, 1), "limits": {"rounds": 1, "sites_to_start": 1},
                                         "merge": {"method": method, **changes}})
    return spec.merge


def merge(inputs: list[Input], settings: Merge, *, parent: dict[str, np.ndarray] | None = None,
          **options: Any) -> tuple[bytes, dict[str, np.ndarray], Any]:
    """Canonical bytes, tensors, and what `merge_deltas` says."""
    shapes = {name: inputs[0].tensors[name].shape for name in inputs[0].tensors if ":" not in name}
    parameters: Layout = {name: ("float32", shape) for name, shape in shapes.items()}
    layout = dict(sorted({**parameters, **outer_layout(parameters, settings)}.items()))
    data, into = allocate_tensors(layout)
    start = {name: np.zeros(shape, np.float32) for name, (_, shape) in layout.items()} | (parent or {})
    said = merge_deltas(start, inputs, settings, into=into, **options)
    return bytes(data), into, said


def compute_digests(shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    found: dict[str, str] = {}
    parent = {name: draw(90 + k, shape) for k, (name, shape) in enumerate(shapes.items())}
    for codec in CODECS:
        inputs = make_inputs(6, codec=codec, shapes=shapes)
        for method in METHODS:
            if codec == "float32" or method in ("clipped_mean", "coordinate_median"):
                data, _, shares = merge(inputs, make_settings(method), parent=parent)
                found[f"{method} {codec}"] = compute_digest(data + repr(shares).encode())
    for kind in OUTERS[1:]:
        parent |= {f"outer.{m}.{name}": np.abs(draw(70 + k, shape)) for m in "mv" for k, (name, shape) in
                   enumerate(shapes.items())}
        state = {k: v for k, v in parent.items() if not k.startswith("outer.v") or kind == "fedadam"}
        settings = make_settings("clipped_mean", outer=Outer(kind=kind, lr=0.7).model_dump())
        found[f"clipped_mean {kind}"] = compute_digest(merge(make_inputs(6, shapes=shapes), settings, parent=state)[0])
    return found


if __name__ == "__main__":
    json.dump(compute_digests({"a": (30, 9), "b": (7,)} if "--small" in sys.argv else SHAPES), sys.stdout)
