"""Blobs by digest, shared by all sites: a folder, S3, or anything else that fsspec reaches.

    blobs/<first two hex digits>/<sha256>     specs, checkpoints, contributions, manifests
    openings/<commitment>                     named by the commitment, which authenticates them
    sealed/<sha256 of the plaintext>          envelopes; what they speak of is a blob like any other (see `sealing`)
    cards/<address>.json                      names of a site's features and labels, for whoever plans a run

The store is not trusted: every read is size-limited and hashed again. Every write is whole or not at all. How bytes
come and go is told in `objects` and `s3`.
"""

from __future__ import annotations

import hashlib
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import numpy.typing as npt

from swarmchain.backends import open_objects, read_options
from swarmchain.checkpoint import Buffer, compute_size, decode_tensors
from swarmchain.config import SiteConfig
from swarmchain.errors import BlobMissing, StoreError, StoreUnreachable, SwarmError
from swarmchain.layouts import checkpoint_layout
from swarmchain.objects import PATIENT, PERMISSIONS, FolderObjects, Found, FsspecObjects, Link, describe, first_line
from swarmchain.objects import translate_os_error as translate
from swarmchain.protocol import (
    MANIFEST_BYTES_MAX,
    OPENING_BYTES_MAX,
    Manifest,
    compute_digest,
    parse_manifest,
)
from swarmchain.spec import SPEC_BYTES_MAX, Spec, parse_spec

_HEX64 = re.compile(r"[0-9a-f]{64}")
_NOTE = re.compile(r"[a-z0-9][a-z0-9.\-]{0,127}")
_CARD = re.compile(r"0x[0-9a-f]{40}\.json")
CARD_BYTES_MAX = 16 << 20
FOLDER_BYTES_MIN = 4 << 20
# what "not allowed" looks like over a folder
_REFUSALS = (PermissionError, IsADirectoryError, NotADirectoryError)
T = TypeVar("T")
U = TypeVar("U")


class Store:
    """A shared folder or object store.

    Parameters
    ----------
    url
        A path, s3://bucket/prefix, or any other fsspec URL.
    options
        What is needed to reach it: the keys of `s3.S3Options` for S3, fsspec's storage options for others.
    profile
        For S3, a profile in the standard AWS files.

    Raises
    ------
    StoreError
        If no such kind of store is installed, a folder does not exist, or the URL holds a password.
    """

    def __init__(self, url: str, *, options: dict[str, Any] | None = None, profile: str | None = None,
                 link: Link = PATIENT) -> None:
        self.url = url
        self.bytes_up = 0
        self.bytes_down = 0
        self._link = link
        self._count = threading.Lock()
        self._objects = open_objects(url, options or {}, profile=profile, link=link)
        self._root = self._objects.root
        self._is_folder = isinstance(self._objects, FolderObjects)

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

    def put_public(self, data: Buffer) -> str:
        """Store what everyone may read, a spec or a manifest: the same as `put_blob`, unless blobs are sealed."""
        return self.put_blob(data)

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

    def read_blob(self, digest: str, into: memoryview) -> None:
        """Fetch a blob of exactly the size of `into`, in pieces that are hashed as they come.

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
        self._add_down(len(into))

    def read_many(self, wanted: Sequence[tuple[str, memoryview]]) -> list[SwarmError | None]:
        """Fetch several blobs side by side, as `read_blob` does; what is wrong with each, None for those that are good.

        Raises
        ------
        StoreUnreachable
            If the store does not answer: that says nothing about a blob.
        """
        def fetch(item: tuple[str, memoryview]) -> SwarmError | None:
            try:
                self.read_blob(*item)
            except StoreUnreachable:
                raise
            except SwarmError as exc:
                return exc
            return None

        return self.each(fetch, wanted, bytes_each=max((len(room) for _, room in wanted), default=0))

    def each(self, fetch: Callable[[T], U], items: Sequence[T], *, bytes_each: int = 0) -> list[U]:
        """`fetch` of each item, side by side; in the items' order. Raises what the first that fails raises.

        Small files of a folder are read one by one: to start threads takes longer.
        """
        if len(items) < 2 or (self._is_folder and bytes_each < FOLDER_BYTES_MIN):
            return [fetch(item) for item in items]
        # the context ends only when no thread writes into anyone's room any more
        with ThreadPoolExecutor(min(self._link.threads, len(items)), thread_name_prefix="store") as pool:
            return list(pool.map(fetch, items))

    def stream_blob(self, digest: str, size: int | None) -> Iterator[memoryview]:
        """A blob's pieces in order, each good until the next is asked for; nothing is hashed.

        Raises as `read_blob` does, but for what only its hash would tell.
        """
        path = self._blob_path(digest)
        pieces = iter(self._objects.stream(path, size))
        while (piece := self._call(path, "read", next, pieces, None)) is not None:
            self._add_down(len(piece))
            yield piece

    def list_blobs(self) -> list[str]:
        """Names of all blobs, in order."""
        root = f"{self._root}/blobs"
        found = self._call(root, "list", lambda: [item.path for item in self._objects.list(root)])
        return sorted({name for path in found if _HEX64.fullmatch(name := path.rsplit("/", 1)[-1])})

    def list_all(self) -> dict[tuple[str, str], Found]:
        """Everything that is named as it should be: ("blobs", "openings" or "sealed", name) → what it is."""
        found: dict[tuple[str, str], Found] = {}
        for kind in ("blobs", "openings", "sealed"):
            root = f"{self._root}/{kind}"
            for item in self._call(root, "list", lambda where=root: list(self._objects.list(where))):
                name = item.path.rsplit("/", 1)[-1]
                if _HEX64.fullmatch(name) and item.path == self._path(kind, name):
                    found[kind, name] = item
        return found

    def remove(self, kind: str, name: str) -> None:
        """Remove one blob or opening; one that is not there is no error."""
        path = self._path(kind, name)
        self._call(path, "remove", self._objects.remove, path)

    def require_whole(self, digest: str) -> None:
        """Raises `StoreError` unless a blob is there, however long, and is what its name says."""
        path = self._blob_path(digest)
        if self._call(path, "read", self._read_into, path, None) != digest:
            raise self._altered(digest)

    def restore_blob(self, data: Buffer, *, digest: str = "") -> str:
        """Store `data` under its digest even where something else lies there; return the digest."""
        digest = digest or compute_digest(data)
        try:
            self.get_blob(digest, bytes_max=len(data))
        except StoreError:
            self._write(self._blob_path(digest), data)
        return digest

    def restore_public(self, data: Buffer) -> str:
        """As `restore_blob`, for what everyone may read."""
        return self.restore_blob(data)

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

    def put_envelope(self, digest: str, data: bytes) -> None:
        """Put an envelope under the digest of the plaintext, also where another lies there."""
        self._write(self._envelope_path(digest), data)

    def get_envelope(self, digest: str, *, bytes_max: int) -> bytes:
        """Fetch the envelope of a plaintext; the caller believes nothing of it. Raises as `get_blob` does."""
        return self._read(self._envelope_path(digest), bytes_max=bytes_max)

    def has_envelope(self, digest: str) -> bool:
        """Whether something lies there."""
        return self._exists(self._envelope_path(digest))

    def put_note(self, name: str, data: bytes) -> None:
        """Leave a small file that nothing is proven by, under a name of our own making."""
        self._write(self._note_path(name), data)

    def get_note(self, name: str, *, bytes_max: int) -> bytes:
        """Fetch such a file. Raises as `get_blob` does, but for its digest."""
        return self._read(self._note_path(name), bytes_max=bytes_max)

    def put_card(self, address: str, data: bytes) -> None:
        """Hand a site's card to the other sites. Anyone can write here: whoever reads it compares the address."""
        self._write(self._card_path(address), data)

    def get_card(self, address: str) -> bytes:
        """Fetch what lies under a site's address; see `put_card`. Raises as `get_blob` does."""
        return self._read(self._card_path(address), bytes_max=CARD_BYTES_MAX)

    def list_cards(self) -> list[str]:
        """Addresses, in lower case, of the sites that have handed in a card."""
        root = f"{self._root}/cards"
        found = self._call(root, "list", lambda: [item.path for item in self._objects.list(root)])
        names = (path.rsplit("/", 1)[-1] for path in found)
        return sorted(name.removesuffix(".json") for name in names if _CARD.fullmatch(name))

    def require_writable(self) -> None:
        """Write, read back and remove a small file.

        Raises
        ------
        StoreError
            If the store is read-only or full. Not if nothing may be removed from it: agents need not.
        """
        path = f"{self._root}/probe-{uuid.uuid4().hex}"
        self._write(path, b"swarmchain")
        if self._read(path, bytes_max=64) != b"swarmchain":
            raise StoreError(f"the store {self.url} does not give back what was written", hint="is it the right one?")
        with suppress(StoreError):
            self._call(path, "remove", self._objects.remove, path)

    def _altered(self, digest: str) -> StoreError:
        return StoreError(
            f"blob {digest[:12]}… in {self.url} is not what its name says",
            hint="somebody altered it or a write broke off: remove it, a site that holds it will put it back",
        )

    def _path(self, kind: str, name: str) -> str:
        return self._blob_path(name) if kind == "blobs" else f"{self._root}/{kind}/{_require_hex(name)}"

    def _blob_path(self, digest: str) -> str:
        return f"{self._root}/blobs/{_require_hex(digest)[:2]}/{digest}"

    def _opening_path(self, commitment: str) -> str:
        return f"{self._root}/openings/{_require_hex(commitment)}"

    def _envelope_path(self, digest: str) -> str:
        return f"{self._root}/sealed/{_require_hex(digest)}"

    def _note_path(self, name: str) -> str:
        if not _NOTE.fullmatch(name):
            raise StoreError(f"{name!r} is no name of a note")
        return f"{self._root}/{name}"

    def _card_path(self, address: str) -> str:
        name = f"{address.lower()}.json"
        if not _CARD.fullmatch(name):
            raise StoreError(f"{address!r} is no address")
        return f"{self._root}/cards/{name}"

    def _exists(self, path: str) -> bool:
        return bool(self._call(path, "look for", self._objects.exists, path))

    def _read(self, path: str, *, bytes_max: int) -> bytes:
        data: bytes = self._call(path, "read", lambda: self._objects.read(path, bytes_max=bytes_max))
        self._add_down(len(data))
        return data

    def _read_into(self, path: str, into: memoryview | None) -> str:
        """Fill `into` (None for no place), and return the digest of what was read."""
        sha = hashlib.sha256()
        for piece in self._objects.stream(path, None if into is None else len(into), into):
            sha.update(piece)
        return sha.hexdigest()

    def _write(self, path: str, data: Buffer) -> None:
        self._call(path, "write", self._write_now, path, data)
        with self._count:
            self.bytes_up += len(data)

    def _write_now(self, path: str, data: Buffer) -> None:
        self._objects.write(path, data)

    def _add_down(self, size: int) -> None:
        with self._count:
            self.bytes_down += size

    def _call(self, path: str, verb: str, function, *args):  # type: ignore[no-untyped-def]
        """Run one operation; every foreign error becomes ours here."""
        if isinstance(self._objects, FsspecObjects):
            return self._link.retrying()(self._call_once, path, verb, function, *args)
        return self._call_once(path, verb, function, *args)

    def _call_once(self, path: str, verb: str, function, *args):  # type: ignore[no-untyped-def]
        if isinstance(self._objects, FolderObjects):
            self._objects.require_there()
        where = f"{describe(path)} in {self.url}"
        try:
            return function(*args)
        except SwarmError:
            raise
        except FileNotFoundError as exc:
            if isinstance(self._objects, FolderObjects):
                self._objects.require_there()
            if verb == "read":
                raise BlobMissing(f"{describe(path)} is not in {self.url}") from exc
            raise StoreError(f"cannot {verb} {where}: {exc.strerror}", hint=PERMISSIONS) from exc
        except _REFUSALS as exc:
            raise StoreError(f"cannot {verb} {where}: {exc.strerror}", hint=PERMISSIONS) from exc
        except OSError as exc:
            raise translate(exc, f"cannot {verb} {where}") from exc
        except Exception as exc:
            if not isinstance(self._objects, FsspecObjects):
                raise
            # a kind of store that we do not know has errors that we do not know
            raise StoreUnreachable(f"cannot {verb} {where}: {first_line(exc)}",
                                   hint="is it up, and are its options right?") from exc


def open_store(config: SiteConfig, *, link: Link = PATIENT) -> Store:
    """The store that a site's settings name.

    Raises
    ------
    ConfigError
        If the options file is missing, readable by others, or not what its kind of store needs.
    StoreError
        As `Store` does.
    """
    named = config.store.options_file
    options = {} if named is None else read_options(config.resolve(named))
    return Store(config.store_url, options=options, profile=config.store.profile, link=link)


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
