"""What a site keeps to itself from round to round: local tensors, and what coding lost of its contributions.

One file for each round that it contributed to. What a later round starts from is the newest file up to the round that
its parent came from, so that a round that failed, or is played again, finds what it found before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from swarmchain.checkpoint import decode_tensors, encode_tensors
from swarmchain.config import write_file
from swarmchain.errors import CheckpointError
from swarmchain.layouts import Layout

Arrays = Mapping[str, npt.NDArray[Any]]

# Files that are kept: a chain may lose blocks, and rounds come again.
KEPT = 32


class Keeper:
    """Tensors of one layout, by round. An empty layout keeps nothing."""

    def __init__(self, folder: Path, name: str, layout: Layout) -> None:
        self._folder, self._name, self._layout = folder, name, layout

    def read(self, round_id: int) -> Arrays | None:
        """The newest tensors up to a round; None if there are none, or they are no longer what they were."""
        rounds = [number for number in self._list() if number <= round_id]
        if not rounds:
            return None
        try:
            return decode_tensors(self._path(rounds[-1]).read_bytes(), self._layout)
        except (FileNotFoundError, CheckpointError):
            return None

    def write(self, round_id: int, tensors: Arrays) -> None:
        """Keep the tensors of a round. Raises `ConfigError` if the folder cannot be written."""
        if not self._layout:
            return
        write_file(self._path(round_id), encode_tensors(tensors, self._layout), mode=0o600)
        for number in self._list()[:-KEPT]:
            self._path(number).unlink(missing_ok=True)

    def _list(self) -> list[int]:
        found = self._folder.glob(f"{self._name}-*.safetensors")
        return sorted(int(path.stem.rsplit("-", 1)[1]) for path in found)

    def _path(self, round_id: int) -> Path:
        return self._folder / f"{self._name}-{round_id}.safetensors"
