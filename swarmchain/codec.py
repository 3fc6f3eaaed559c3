"""Float32 deltas ⇄ what travels: float32, float16, or int8 with one scale for each tensor.

What coding loses is kept at the site and added to its next delta (error feedback; Seide et al. 2014, Karimireddy et al.
2019). A coded contribution *is* the float32 numbers that decoding gives, and decoding rounds each of them once at most,
so that all sites read the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmchain.layouts import SCALE
from swarmchain.merging import Codec

Arrays = Mapping[str, npt.NDArray[Any]]
Singles = npt.NDArray[np.float32]

_UNITS = 127
_FLOAT16_MAX = float(np.finfo(np.float16).max)


def encode_deltas(deltas: Arrays, codec: Codec, *, residual: Arrays | None = None) -> tuple[Arrays, Arrays]:
    """Coded tensors of `layouts.code_layout`, and what they lack of deltas and residual.

    Parameters
    ----------
    deltas
        Float32, by name.
    residual
        What the last coding lost, of the same names and shapes.
    """
    coded: dict[str, npt.NDArray[Any]] = {}
    lost: dict[str, npt.NDArray[Any]] = {}
    for name, delta in deltas.items():
        wanted = delta + residual[name] if residual is not None else delta
        if codec == "float32":
            coded[name] = wanted
        elif codec == "float16":
            coded[name] = np.clip(wanted, -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16)
        else:
            scale = np.float32(np.abs(wanted).max(initial=0.0) / _UNITS)
            units = np.rint(wanted / scale) if scale > 0 else np.zeros_like(wanted)
            coded[name] = np.clip(units, -_UNITS, _UNITS).astype(np.int8)
            coded[name + SCALE] = np.array(scale, np.float32)
        lost[name] = wanted - read_piece(coded, name, 0, delta.size).reshape(delta.shape)
    return coded, lost


def read_piece(coded: Arrays, name: str, start: int, stop: int, *, scratch: Singles | None = None) -> Singles:
    """Elements of one delta as float32, flat: a view where nothing needs decoding, else written into `scratch`."""
    piece = coded[name].reshape(-1)[start:stop]
    if piece.dtype == np.float32:
        return piece
    out = np.empty(piece.size, np.float32) if scratch is None else scratch[: piece.size]
    out[:] = piece
    if piece.dtype == np.int8:
        np.multiply(out, np.float32(coded[name + SCALE]), out=out)
    return out


def list_deltas(coded: Arrays) -> list[str]:
    """Names of the deltas, in canonical order."""
    return sorted(name for name in coded if not name.endswith(SCALE))
