"""Blobs by digest, shared by all sites, over fsspec.

    blobs/<first two hex digits>/<sha256>     specs, checkpoints, contributions, manifests
    openings/<commitment>                     named by the commitment, which authenticates them
    cards/<address>.json                      names of a site's features and labels, for whoever plans a run

The store is not trusted: every read is size-limited and hashed again. Every write is whole or not at all: a folder
gets a temporary file that is renamed, object stores do so by themselves.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy.typing as npt
from fsspec.implementations.local import LocalFileSystem

from swarmchain.checkpoint import Buffer, compute_size, decode_tensors
from swarmchain.errors import BlobMissing, CheckpointError, StoreError, StoreFull, StoreUnreachable
from swarmchain.layouts import checkpoint_layout
from swarmchain.protocol import MANIFEST_BYTES_MAX, OPENING_BYTES_MAX, Manifest, compute_digest, parse_manifest
from swarmchain.spec import SPEC_BYTES_MAX, Spec, parse_spec

_HEX64 = re.compile(r"[0-9a-f]{64}")
_CARD = re.compile(r"0x[0-9a-f]{40}\.json")
CARD_BYTES_MAX = 16 << 20
# What "not allowed", "read-only" and "full" look like over a folder; of these, only the last may mend by waiting.
_REFUSALS = (PermissionError, IsADirectoryError, NotADirectoryError)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PIECE = 256 << 10
_PERMISSIONS = "check that the store is there, and that this account may write to it"


class Store:
    """A shared folder or object store.

    Parameters
    ----------
    url
        A path or any fsspec URL.

    Raises
    ------
    StoreError
        If no such kind of store is installed, or a folder does not exist.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.bytes_up = 0
        self.bytes_down = 0
        try:
            fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as exc:
            raise StoreError(
                f"store {url}: {_first_line(exc)}", hint="check the URL, or install the fsspec package for it"
            ) from exc
        self._fs = fs
        self._root = root.rstrip("/")
        self._is_folder = isinstance(fs, LocalFileSystem)
        self._was_there = False
        if self._is_folder and not Path(self._root).is_dir():
            raise StoreError(f"store {url} is no folder", hint="create it, or mount it, and make it writable")

    def has_blob(self, digest: str) -> bool:
        """Whether a blob of this name is there; its content is checked on reading only."""
        return self._exists(self._blob_path(digest))

    def put_blob(self, data: Buffer, *, digest: str = "") -> str:
        """Store `data` under its digest, once; return the digest. Whoever has computed it says it."""
        digest = digest or compute_digest(data)
        path = self._blob_path(digest)
        if not self._exists(path):
            self._write(path, data)
        return digest

    def get_blob(self, digest: str, *, bytes_max: int) -> bytes:
        """Fetch a blob and hash it again.

        Raises
        ------
        BlobMissing
            If it is not there (yet).
        StoreError
            If it is longer than `bytes_max` or its bytes are not those of its name.
        """
        data = self._read(self._blob_path(digest), bytes_max=bytes_max)
        if compute_digest(data) != digest:
            raise self._altered(digest)
        return data

    def _altered(self, digest: str) -> StoreError:
        return StoreError(
            f"blob {digest[:12]}… in {self.url} is not what its name says",
            hint="somebody altered it or a write broke off: remove it, a site that holds it will put it back",
        )

    def read_blob(self, digest: str, into: memoryview) -> None:
        """Fetch a blob of exactly the size of `into`, in pieces that are hashed while the processor's cache has them.

        Raises
        ------
        CheckpointError
            If it has another size.
        StoreError
            As `get_blob` does.
        """
        path = self._blob_path(digest)
        if self._call(path, "read", self._read_into, path, into) != digest:
            raise self._altered(digest)

    def list_blobs(self) -> list[str]:
        """Names of all blobs, in order."""
        root = f"{self._root}/blobs"
        found = self._call(root, "list", self._fs.find, root) if self._exists(root) else []
        return sorted({name for path in found if _HEX64.fullmatch(name := path.rsplit("/", 1)[-1])})

    def require_whole(self, digest: str) -> None:
        """Raises `StoreError` unless a blob is there, however long, and is what its name says."""
        path = self._blob_path(digest)
        if self._call(path, "read", self._hash_now, path) != digest:
            raise self._altered(digest)

    def restore_blob(self, data: Buffer, *, digest: str = "") -> str:
        """Store `data` under its digest even where something else lies there; return the digest."""
        digest = digest or compute_digest(data)
        try:
            self.get_blob(digest, bytes_max=len(data))
        except StoreError:
            self._write(self._blob_path(digest), data)
        return digest

    def put_opening(self, commitment: str, data: bytes) -> None:
        """Disclose an opening under its commitment, also where anyone has put something else there."""
        path = self._opening_path(commitment)
        try:
            found = self._read(path, bytes_max=OPENING_BYTES_MAX)
        except StoreError:
            found = b""
        if found != data:
            self._write(path, data)

    def get_opening(self, commitment: str) -> bytes:
        """Fetch what lies under a commitment; the caller checks that it opens it. Raises as `get_blob` does."""
        return self._read(self._opening_path(commitment), bytes_max=OPENING_BYTES_MAX)

    def has_opening(self, commitment: str) -> bool:
        """Whether something lies under this commitment."""
        return self._exists(self._opening_path(commitment))

    def put_card(self, address: str, data: bytes) -> None:
        """Hand a site's card to the other sites. Anyone can write here: whoever reads it compares the address."""
        self._write(self._card_path(address), data)

    def get_card(self, address: str) -> bytes:
        """Fetch what lies under a site's address; see `put_card`. Raises as `get_blob` does."""
        return self._read(self._card_path(address), bytes_max=CARD_BYTES_MAX)

    def list_cards(self) -> list[str]:
        """Addresses, in lower case, of the sites that have handed in a card."""
        root = f"{self._root}/cards"
        found = self._call(root, "list", self._fs.find, root) if self._exists(root) else []
        names = (path.rsplit("/", 1)[-1] for path in found)
        return sorted(name.removesuffix(".json") for name in names if _CARD.fullmatch(name))

    def require_writable(self) -> None:
        """Write, read back and remove a small file.

        Raises
        ------
        StoreError
            If the store is read-only or full.
        """
        path = f"{self._root}/probe-{uuid.uuid4().hex}"
        self._write(path, b"swarmchain")
        self._read(path, bytes_max=64)
        self._call(path, "remove", self._fs.rm_file, path)

    def _blob_path(self, digest: str) -> str:
        return f"{self._root}/blobs/{_require_hex(digest)[:2]}/{digest}"

    def _opening_path(self, commitment: str) -> str:
        return f"{self._root}/openings/{_require_hex(commitment)}"

    def _card_path(self, address: str) -> str:
        name = f"{address.lower()}.json"
        if not _CARD.fullmatch(name):
            raise StoreError(f"{address!r} is no address")
        return f"{self._root}/cards/{name}"

    def _exists(self, path: str) -> bool:
        # for a folder not fsspec's own: it works the path out anew each time, and agents look often
        return bool(self._call(path, "look for", os.path.exists if self._is_folder else self._fs.exists, path))

    def _read(self, path: str, *, bytes_max: int) -> bytes:
        return self._call(path, "read", self._read_now, path, bytes_max)  # type: ignore[no-any-return]

    def _read_now(self, path: str, bytes_max: int) -> bytes:
        with self._open(path) as file:
            data: bytes = file.read(bytes_max + 1)
        self.bytes_down += len(data)
        if len(data) > bytes_max:
            raise StoreError(f"{_short(path)} in {self.url} is longer than the {bytes_max} bytes it may have")
        return data

    def _read_into(self, path: str, into: memoryview) -> str:
        """Fill `into`, and return the digest of what was read."""
        sha, at = hashlib.sha256(), 0
        with self._open(path) as file:
            while at < len(into) and (count := file.readinto(into[at : at + _PIECE])):
                sha.update(into[at : at + count])
                at += count
            is_longer = at == len(into) and file.read(1)
        self.bytes_down += at
        if at < len(into) or is_longer:
            size = f"more than {at}" if is_longer else at
            raise CheckpointError(f"{_short(path)} in {self.url}: {size} bytes where the spec prescribes {len(into)}")
        return sha.hexdigest()

    def _hash_now(self, path: str) -> str:
        with self._open(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _open(self, path: str) -> Any:
        # a folder's files without Python's own buffer: it would copy everything once more
        return Path(path).open("rb", buffering=0) if self._is_folder else self._fs.open(path, "rb")

    def _write(self, path: str, data: Buffer) -> None:
        self._call(path, "write", self._write_now, path, data)
        self.bytes_up += len(data)

    def _write_now(self, path: str, data: Buffer) -> None:
        if not self._is_folder:
            self._fs.pipe_file(path, bytes(data))
            return
        target = Path(path)
        if not self._was_there:
            for name in ("blobs", "openings"):
                Path(self._root, name).mkdir(exist_ok=True)
        # one level and no more: a store that was there and is gone is a mount point that lost its file system
        target.parent.mkdir(exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            self._was_there = True
        finally:
            temporary.unlink(missing_ok=True)

    def _call(self, path: str, verb: str, function, *args):  # type: ignore[no-untyped-def]
        """Run one file operation; every foreign error becomes ours here."""
        if self._is_folder:
            self._require_there()
        where = f"{_short(path)} in {self.url}"
        try:
            return function(*args)
        except StoreError:
            raise
        except FileNotFoundError as exc:
            if self._is_folder:
                self._require_there()
            if verb == "read":
                raise BlobMissing(f"{_short(path)} is not in {self.url}") from exc
            raise StoreError(f"cannot {verb} {where}: {exc.strerror}", hint=_PERMISSIONS) from exc
        except _REFUSALS as exc:
            raise StoreError(f"cannot {verb} {where}: {exc.strerror}", hint=_PERMISSIONS) from exc
        except OSError as exc:
            if exc.errno == errno.EROFS:
                raise StoreError(f"cannot {verb} {where}: {exc.strerror}", hint=_PERMISSIONS) from exc
            if exc.errno in _FULL:
                raise StoreFull(f"cannot {verb} {where}: {_first_line(exc)}", hint="free space in the store") from exc
            raise StoreUnreachable(
                f"cannot {verb} {where}: {_first_line(exc)}", hint="is it up, and does the network reach it?"
            ) from exc

    def _require_there(self) -> None:
        """A folder that was unmounted must not look like a store whose blobs are missing, nor be written to."""
        if os.path.isdir(f"{self._root}/blobs"):  # noqa: PTH112 - a path object takes longer than the look
            self._was_there = True
        elif self._was_there or not Path(self._root).is_dir():
            raise StoreUnreachable(f"the store {self.url} is gone", hint="mount it again")


def read_spec(store: Store, digest: str) -> Spec:
    """Fetch and parse a run's spec. Raises `SpecError`, or `StoreError` if the store does not hold it."""
    return parse_spec(store.get_blob(digest, bytes_max=SPEC_BYTES_MAX))


def read_manifest(store: Store, digest: str) -> Manifest:
    """Fetch and parse a round's manifest. Raises `OpeningError`, or `StoreError` if the store does not hold it."""
    return parse_manifest(store.get_blob(digest, bytes_max=MANIFEST_BYTES_MAX))


def read_checkpoint(store: Store, digest: str, spec: Spec) -> dict[str, npt.NDArray[Any]]:
    """Fetch a checkpoint's tensors. Raises `CheckpointError`, or `StoreError` if the store does not hold it."""
    layout = checkpoint_layout(spec)
    return decode_tensors(store.get_blob(digest, bytes_max=compute_size(layout)), layout)


def _require_hex(digest: str) -> str:
    """Digests become paths: nothing but 64 hex digits may."""
    if not _HEX64.fullmatch(digest):
        raise StoreError(f"{digest!r} is no digest")
    return digest


def _short(path: str) -> str:
    kind, name = path.split("/")[-2:]
    return f"{'opening' if kind == 'openings' else 'blob'} {name[:12]}…" if len(name) == 64 else name


def _first_line(exc: BaseException) -> str:
    return (str(exc) or type(exc).__name__).splitlines()[0]
