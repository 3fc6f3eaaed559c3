"""What a store is made of: bytes by path, in a folder or anywhere that fsspec reaches. Object stores are in `s3`.

None of them is trusted. Sizes are checked before bytes are taken in, no link is followed out of a folder, and nothing
but plain files is opened: a pipe or a device in the place of a blob would hold up its reader for ever.
"""

from __future__ import annotations

import errno
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from swarmchain.checkpoint import Buffer
from swarmchain.errors import CheckpointError, StoreError, StoreFull, StoreUnreachable, SwarmError

PIECE = 256 << 10
LIST_MAX = 1_000_000
# Of fsspec's kinds, those whose single writes are whole or not at all; the others get a temporary file and a move.
ATOMIC = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "memory"}
PERMISSIONS = "check that the store is there, and that this account may write to it"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the one refusal that may mend by waiting
_NO_FOLLOW = os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Link:
    """How patient one is with a server, and how many requests run side by side.

    A request that fails for a reason that may pass is repeated up to `attempts` times in all. The pauses double from
    `pause_s` up to `pause_max_s`, each shortened at random by up to a half, so that sites do not come back in step.
    """

    timeout_s: float = 60.0
    attempts: int = 5
    pause_s: float = 0.2
    pause_max_s: float = 10.0
    threads: int = 4
    seed: int = 0
    sleep: Callable[[float], None] = time.sleep

    def retrying(self) -> Retrying:
        """Repeats what raises `StoreUnreachable`, and then lets it through. A full store is not asked again at once."""
        random = Random(self.seed)  # noqa: S311 - it spreads load and hides nothing

        def wait(state: RetryCallState) -> float:
            pause: float = min(self.pause_s * 2.0 ** (state.attempt_number - 1), self.pause_max_s)
            return pause * (1 - random.random() / 2)

        return Retrying(stop=stop_after_attempt(self.attempts), wait=wait, sleep=self.sleep, reraise=True,
                        retry=retry_if_exception(may_pass))


PATIENT = Link()


def may_pass(exc: BaseException) -> bool:
    """Whether asking again at once is worth while."""
    return isinstance(exc, StoreUnreachable) and not isinstance(exc, StoreFull)


@dataclass(frozen=True)
class Found:
    """One object in a listing: its path, size in bytes, and when it was written last (seconds since 1970)."""

    path: str
    size: int
    written_at: float


class Objects(Protocol):
    """Bytes by path. Foreign errors are `OSError`, or ours already."""

    root: str

    def exists(self, path: str) -> bool:
        """Whether an object is there."""
        ...

    def read(self, path: str, *, bytes_max: int) -> bytes:
        """A whole object. Raises `StoreError` if it is longer than `bytes_max`, before it is read."""
        ...

    def stream(self, path: str, size: int | None, into: memoryview | None = None) -> Iterator[memoryview]:
        """An object in its pieces, in order: each is good until the next is asked for, or a part of `into`.

        Raises `CheckpointError` if the object has another `size`; None takes whatever it has.
        """
        ...

    def write(self, path: str, data: Buffer) -> None:
        """Put an object there, whole or not at all."""
        ...

    def remove(self, path: str) -> None:
        """Take an object away; one that is not there is no error."""
        ...

    def list(self, path: str) -> Iterator[Found]:
        """All objects below a path, `LIST_MAX` at most."""
        ...


class FolderObjects:
    """A folder, local or mounted. Nothing in it is followed elsewhere: only its own path may hold links."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._was_there = False

    def require_there(self) -> None:
        """A folder that was unmounted must not look like a store whose blobs are missing, nor be written to."""
        if os.path.isdir(f"{self.root}/blobs"):  # noqa: PTH112 - a path object takes longer than the look
            self._was_there = True
        elif self._was_there or not Path(self.root).is_dir():
            raise StoreUnreachable(f"the store {self.root} is gone", hint="mount it again")

    def exists(self, path: str) -> bool:
        """Whether a plain file is there."""
        try:
            return stat.S_ISREG(os.lstat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def read(self, path: str, *, bytes_max: int) -> bytes:
        """A whole file."""
        with self._open(path) as descriptor:
            size = os.fstat(descriptor).st_size
            require_size(path, size, bytes_max)
            parts, left = [], bytes_max + 1  # one more: it may grow while it is read
            while left > 0 and (part := os.read(descriptor, min(left, max(size, 1) + 1))):
                parts.append(part)
                left -= len(part)
        if not left:
            raise StoreError(f"{describe(path)} is longer than the {bytes_max} bytes it may have")
        return b"".join(parts)

    def stream(self, path: str, size: int | None, into: memoryview | None = None) -> Iterator[memoryview]:
        """A file in pieces that a processor's cache holds while they are hashed."""
        with self._open(path) as descriptor:
            found = os.fstat(descriptor).st_size
            require_exact(path, found, size)
            ring, at = memoryview(bytearray(PIECE)), 0
            while at < found:
                room = ring if into is None else into[at:]
                count = os.readv(descriptor, [room[: min(PIECE, found - at)]])
                if not count:
                    raise CheckpointError(f"{describe(path)}: {at} bytes where {found} were promised")
                yield room[:count]
                at += count

    def write(self, path: str, data: Buffer) -> None:
        """A temporary file beside its place, then a rename."""
        *folders, name = path[len(self.root) + 1 :].split("/")
        if not self._was_there:
            for kind in ("blobs", "openings"):
                Path(self.root, kind).mkdir(exist_ok=True)
        # one level and no more: a store that was there and is gone is a mount point that lost its file system
        with suppress(FileExistsError):
            Path(path).parent.mkdir()
        with self._enter(folders) as folder:
            temporary = f".{name}.{uuid.uuid4().hex}.tmp"
            try:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666,
                                     dir_fd=folder)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(descriptor)
                os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
                self._was_there = True
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)

    def remove(self, path: str) -> None:
        """Remove a file, or a link in its place."""
        *folders, name = path[len(self.root) + 1 :].split("/")
        with self._enter(folders) as folder, suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)

    def list(self, path: str) -> Iterator[Found]:
        """All plain files below a folder."""
        count = 0
        for folder, _, names in os.walk(path, followlinks=False):
            for name in names:
                with suppress(FileNotFoundError):
                    found = os.lstat(where := f"{folder}/{name}")
                    if stat.S_ISREG(found.st_mode):
                        require_countable(path, count := count + 1)
                        yield Found(where, found.st_size, found.st_mtime)

    @contextmanager
    def _enter(self, folders: Sequence[str]) -> Iterator[int]:
        """Descriptor of a folder below the root, reached without following a link."""
        # the root itself may be a link: it is this site's own setting
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in folders:
                inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | _NO_FOLLOW, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = inner
            yield descriptor
        except OSError as exc:
            if exc.errno in (errno.ELOOP, errno.ENOTDIR):
                raise _no_file("/".join(folders)) from exc
            raise
        finally:
            os.close(descriptor)

    @contextmanager
    def _open(self, path: str) -> Iterator[int]:
        *folders, name = path[len(self.root) + 1 :].split("/")
        with self._enter(folders) as folder:
            # a pipe that nobody writes to would hold up a reader that blocks
            descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | _NO_FOLLOW, dir_fd=folder)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise _no_file(path)
                yield descriptor
            finally:
                os.close(descriptor)


class FsspecObjects:
    """Anything that fsspec reaches. It is asked anew each time: its caches of listings would hide what others wrote."""

    def __init__(self, fs: Any, root: str, *, link: Link) -> None:
        self.root = root
        self._fs = fs
        self._link = link
        kinds = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self._is_atomic = bool(kinds & ATOMIC)

    def exists(self, path: str) -> bool:
        """Whether an object is there."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(path))

    def read(self, path: str, *, bytes_max: int) -> bytes:
        """A whole object."""
        with self._fs.open(path, "rb", cache_type="none") as file:
            data: bytes = file.read(bytes_max + 1)
        require_size(path, len(data), bytes_max)
        return data

    def stream(self, path: str, size: int | None, into: memoryview | None = None) -> Iterator[memoryview]:
        """An object, piece after piece."""
        with self._fs.open(path, "rb", cache_type="none") as file:
            at, piece = 0, 4 * PIECE
            while data := file.read(piece if size is None else min(piece, size - at + 1)):
                at += len(data)
                if size is not None and at > size:
                    raise CheckpointError(f"{describe(path)}: more than {size} bytes where {size} are prescribed")
                if into is not None:
                    into[at - len(data) : at] = data
                yield memoryview(data)
            require_exact(path, at, size)

    def write(self, path: str, data: Buffer) -> None:
        """One write where that is whole or not at all, else a temporary file that is moved."""
        if self._is_atomic:
            self._fs.pipe_file(path, bytes(data))
            return
        self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            self._fs.pipe_file(temporary, bytes(data))
            self._fs.mv(temporary, path)
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(temporary)
            raise

    def remove(self, path: str) -> None:
        """Take an object away."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def list(self, path: str) -> Iterator[Found]:
        """All objects below a path."""
        self._fs.invalidate_cache()
        if not self._fs.exists(path):
            return
        for count, (name, about) in enumerate(self._fs.find(path, detail=True).items(), 1):
            require_countable(path, count)
            written = about.get("mtime", about.get("created"))
            stamp = getattr(written, "timestamp", lambda w=written: float(w or 0))()
            yield Found(name, int(about.get("size") or 0), stamp)


def require_size(path: str, size: int, bytes_max: int) -> None:
    """Raises `StoreError` if an object is longer than it may be."""
    if size > bytes_max:
        raise StoreError(f"{describe(path)} is longer than the {bytes_max} bytes it may have")


def require_exact(path: str, size: int, expected: int | None) -> None:
    """Raises `CheckpointError` if an object has another size than the spec prescribes."""
    if expected is not None and size != expected:
        raise CheckpointError(f"{describe(path)}: {size} bytes where the spec prescribes {expected}")


def require_countable(path: str, count: int) -> None:
    """Raises `StoreError` for a listing that has no end."""
    if count > LIST_MAX:
        raise StoreError(f"the store lists more than {LIST_MAX} objects under {path.rsplit('/', 1)[-1]}",
                         hint="prune it, or ask who operates it what they are")


def describe(path: str) -> str:
    """An object in words, by the last two parts of its path."""
    kind, name = path.split("/")[-2:]
    return f"{'opening' if kind == 'openings' else 'blob'} {name[:12]}…" if len(name) == 64 else name


def first_line(exc: BaseException) -> str:
    """What a foreign error says, on one line."""
    return (str(exc) or type(exc).__name__).splitlines()[0]


def _no_file(path: str) -> StoreError:
    return StoreError(f"{describe('/' + path)} in the store is a link, a device or a pipe, and not a file",
                      hint="remove it: nobody needs to put one there")


def translate_os_error(exc: OSError, what: str) -> SwarmError:
    """Ours for an error of the system: whether the store refuses, is full, or does not answer."""
    if exc.errno == errno.EROFS:
        return StoreError(f"{what}: {exc.strerror}", hint=PERMISSIONS)
    if exc.errno == errno.ELOOP:
        return StoreError(f"{what}: it is a link", hint="remove it: a store's links are not followed")
    if exc.errno in _FULL:
        return StoreFull(f"{what}: {first_line(exc)}", hint="free space in the store")
    return StoreUnreachable(f"{what}: {first_line(exc)}", hint="is it up, and does the network reach it?")
