"""Room for the contributions of a round: one slot for each site, used again from round to round.

Slots lie in memory as long as all of them together are small, else in files of the site's own, so that a merge of big
models needs disk and not memory. The shared store's files are never mapped: another site could cut one short while it
is being read.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

from swarmchain.errors import ConfigError

MEMORY_BYTES = 256 << 20


class Spool:
    """Slots by number.

    Parameters
    ----------
    folder
        For the files; they have no names, and are gone with the process.
    memory_bytes
        What all slots in memory may take together.
    """

    def __init__(self, folder: Path, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._folder = folder
        self._memory_left = memory_bytes
        self._slots: dict[int, mmap.mmap] = {}

    def get_slot(self, number: int, size: int) -> memoryview:
        """A writable slot of `size` bytes that holds what was last written there.

        Raises
        ------
        ConfigError
            If the disk has no room for it.
        """
        slot = self._slots.get(number)
        if slot is None or len(slot) != size:
            slot = self._slots[number] = self._create(size)
        return memoryview(slot)

    def _create(self, size: int) -> mmap.mmap:
        if size <= self._memory_left:
            self._memory_left -= size
            return mmap.mmap(-1, size)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as file:
                # room is taken now: a full disk found later would end the process in the midst of a write
                os.posix_fallocate(file.fileno(), 0, size)
                return mmap.mmap(file.fileno(), size)
        except OSError as exc:
            raise ConfigError(f"cannot make room for {size} bytes in {self._folder}: {exc.strerror}",
                              hint="free space there, or move [agent] work_dir") from exc
