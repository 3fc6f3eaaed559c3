"""Named tensors ⇄ canonical bytes ⇄ digest.

The bytes are a safetensors file that any safetensors reader opens, written in one way only: tensors in the order of
their names, no metadata, compact header padded with spaces to a multiple of 8. We write the header ourselves because
the library's own order of entries is not promised over its versions, and the digest must never move. As the layout
of a run's blobs follows from its spec, the reader knows every byte of the header beforehand and compares it whole.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmchain.errors import CheckpointError
from swarmchain.layouts import Layout

Tensors = Mapping[str, npt.NDArray[Any]]
Buffer = bytes | bytearray | memoryview

_CODES = {"float32": "F32", "float64": "F64", "int64": "I64", "float16": "F16", "int8": "I8"}

if sys.byteorder != "little":  # safetensors is little-endian; nobody trains on anything else
    raise ImportError("swarmchain runs on little-endian machines only")


def compute_size(layout: Layout) -> int:
    """Exact number of bytes of a blob with this layout."""
    return len(_encode_header(layout)) + sum(_nbytes(*entry) for entry in layout.values())


def encode_tensors(tensors: Tensors, layout: Layout) -> bytes:
    """Canonical bytes of `tensors`.

    Raises
    ------
    CheckpointError
        If names, dtypes or shapes are not those of `layout`, or a value is not finite.
    """
    if set(tensors) != set(layout):
        raise CheckpointError(f"tensors {sorted(set(tensors) ^ set(layout))} are missing or too many")
    parts = [_encode_header(layout)]
    for name, (dtype, shape) in sorted(layout.items()):
        array = np.asarray(tensors[name], order="C")
        if array.dtype != np.dtype(dtype) or array.shape != tuple(shape):
            raise CheckpointError(f"tensor {name} is {array.dtype}{array.shape}, not {dtype}{tuple(shape)}")
        _require_finite(name, array)
        parts.append(array.tobytes())
    return b"".join(parts)


def allocate_tensors(layout: Layout) -> tuple[bytearray, dict[str, npt.NDArray[Any]]]:
    """Canonical bytes of zeros, and the arrays that lie in them: who writes into those need not encode them."""
    data = bytearray(compute_size(layout))
    header = _encode_header(layout)
    data[: len(header)] = header
    return data, _view_tensors(data, layout)


def decode_tensors(data: Buffer, layout: Layout, *, is_finite: bool = True) -> dict[str, npt.NDArray[Any]]:
    """Read canonical bytes; the arrays are views of `data`.

    Parameters
    ----------
    is_finite
        Refuse NaN and infinity; False leaves that to the caller.

    Raises
    ------
    CheckpointError
        If size or header differ from what `layout` prescribes, or a value is not finite.
    """
    header = _encode_header(layout)
    size = compute_size(layout)
    if len(data) != size:
        raise CheckpointError(f"{len(data)} bytes where the spec prescribes {size}")
    if bytes(memoryview(data)[: len(header)]) != header:
        raise CheckpointError("names, dtypes, shapes or order of the tensors are not those of the spec")
    tensors = _view_tensors(data, layout)
    if is_finite:
        for name, array in tensors.items():
            _require_finite(name, array)
    return tensors


def _encode_header(layout: Layout) -> bytes:
    return _encode_entries(tuple(sorted(layout.items())))


@lru_cache(maxsize=16)
def _encode_entries(layout: tuple[tuple[str, tuple[str, tuple[int, ...]]], ...]) -> bytes:
    """The header; a site reads many contributions of one layout."""
    entries: dict[str, object] = {}
    offset = 0
    for name, (dtype, shape) in layout:
        end = offset + _nbytes(dtype, shape)
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _view_tensors(data: Buffer, layout: Layout) -> dict[str, npt.NDArray[Any]]:
    tensors: dict[str, npt.NDArray[Any]] = {}
    offset = len(_encode_header(layout))
    for name, (dtype, shape) in sorted(layout.items()):
        tensors[name] = np.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=offset).reshape(shape)
        offset += _nbytes(dtype, shape)
    return tensors


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _require_finite(name: str, array: npt.NDArray[np.generic]) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CheckpointError(f"tensor {name} holds NaN or infinity")
