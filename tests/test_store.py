"""The store over a folder, a real SeaweedFS, fsspec, and servers that are up to no good."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
from seaweed import Seaweed

from swarmchain.config import read_site_config
from swarmchain.errors import (
    BlobMissing,
    CheckpointError,
    ConfigError,
    OpeningError,
    StoreError,
    StoreUnreachable,
    SwarmError,
)
from swarmchain.objects import FsspecObjects, Link
from swarmchain.protocol import compute_digest, parse_manifest, parse_opening
from swarmchain.s3 import PART, RANGE
from swarmchain.site_text import render_site_toml
from swarmchain.store import Store, open_store

ZERO = "0" * 64
# as patient as ever, but without the waiting
BRISK = Link(timeout_s=5.0, attempts=3, sleep=lambda _: None)


@pytest.fixture(params=["folder", "s3", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Each kind of store, empty."""
    if request.param == "folder":
        return Store(str(tmp_path))
    if request.param == "memory":
        return Store(f"memory://{tmp_path.name}", link=BRISK)
    seaweed = request.getfixturevalue("seaweed")
    return Store(f"s3://swarm/{tmp_path.name}", options=seaweed.options(), link=BRISK)


def fill(size: int, seed: int = 0) -> bytes:
    return Random(seed).randbytes(size)


# -- every kind of store behaves alike


def test_store_of_any_kind_round_trip(store: Store) -> None:
    store.require_writable()
    data = fill(70_000)
    digest = store.put_blob(data)
    assert store.has_blob(digest) and not store.has_blob(ZERO)
    assert store.get_blob(digest, bytes_max=len(data)) == data
    room = memoryview(bytearray(len(data)))
    store.read_blob(digest, room)
    assert bytes(room) == data
    store.require_whole(digest)
    assert b"".join(bytes(piece) for piece in store.stream_blob(digest, len(data))) == data
    empty = store.put_blob(b"")
    assert store.get_blob(empty, bytes_max=0) == b""
    assert store.list_blobs() == sorted([digest, empty])
    store.put_opening(ZERO, b"squatter")
    store.put_opening(ZERO, b"mine")
    assert store.get_opening(ZERO) == b"mine" and store.has_opening(ZERO)
    assert set(store.list_all()) == {("blobs", digest), ("blobs", empty), ("openings", ZERO)}
    store.remove("openings", ZERO)
    store.remove("openings", ZERO)
    assert not store.has_opening(ZERO)


def test_invalid_blob_in_any_kind_of_store(store: Store) -> None:
    digest = store.put_blob(b"hello")
    with pytest.raises(BlobMissing):
        store.get_blob(ZERO, bytes_max=5)
    with pytest.raises(BlobMissing):
        store.read_blob(ZERO, memoryview(bytearray(5)))
    with pytest.raises(StoreError, match="longer than the 4 bytes"):
        store.get_blob(digest, bytes_max=4)
    for size in (4, 6):
        with pytest.raises(CheckpointError, match="where"):
            store.read_blob(digest, memoryview(bytearray(size)))
    store._write(store._blob_path(digest), b"jello")
    for read in (lambda: store.get_blob(digest, bytes_max=5), lambda: store.require_whole(digest),
                 lambda: store.read_blob(digest, memoryview(bytearray(5)))):
        with pytest.raises(StoreError, match="not what its name says"):
            read()
    assert store.restore_blob(b"hello") == digest
    assert store.get_blob(digest, bytes_max=5) == b"hello"


def test_store_of_any_kind_reads_many_side_by_side(store: Store) -> None:
    blobs = [fill(5_000, seed) for seed in range(6)]
    wanted = [(store.put_blob(data), memoryview(bytearray(5_000))) for data in blobs]
    wanted[2] = (ZERO, wanted[2][1])
    wanted[4] = (wanted[4][0], memoryview(bytearray(7)))
    problems = store.read_many(wanted)
    assert [type(problem) for problem in problems] == [type(None)] * 2 + [BlobMissing] + [type(None)] + [
        CheckpointError, type(None)]
    assert all(bytes(room) == data for (_, room), data, problem in zip(wanted, blobs, problems, strict=True)
               if problem is None)


@pytest.mark.parametrize("key", ["../../etc/passwd", "..", "", "a" * 63, "A" * 64, f"{'a' * 62}/.", "a" * 64 + "\n"])
def test_invalid_key_never_becomes_a_path(store: Store, key: str) -> None:
    for use in (store.has_blob, store.has_opening, store.get_opening, store.require_whole,
                lambda k: store.put_blob(b"x", digest=k or "."), lambda k: store.put_opening(k, b"x")):
        with pytest.raises(StoreError, match="no digest"):
            use(key)


# -- folder


def test_invalid_link_pipe_and_device_in_a_folder(tmp_path: Path) -> None:
    """Nothing outside is read or written, and a pipe holds nobody up."""
    store = Store(str(tmp_path / "store")) if (tmp_path / "store").mkdir() is None else None
    assert store is not None
    digest = store.put_blob(b"hello")
    secret = tmp_path / "secret"
    secret.write_bytes(b"hello")
    path = Path(store._blob_path(digest))
    for kind in ("link", "pipe", "folder"):
        path.unlink()
        if kind == "link":
            path.symlink_to(secret)
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
        assert not store.has_blob(digest)
        for read in (lambda: store.get_blob(digest, bytes_max=5), lambda: store.require_whole(digest),
                     lambda: store.read_blob(digest, memoryview(bytearray(5)))):
            with pytest.raises(StoreError, match="a link"):
                read()
        if kind == "folder":
            path.rmdir()
        store.restore_blob(b"hello")
        assert store.get_blob(digest, bytes_max=5) == b"hello" and not path.is_symlink()
    assert secret.read_bytes() == b"hello"


def test_invalid_link_in_the_place_of_a_folder_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "elsewhere").mkdir()
    store = Store(str(tmp_path / "store"))
    digest = compute_digest(b"hello")
    (tmp_path / "store" / "blobs").mkdir()
    (tmp_path / "store" / "blobs" / digest[:2]).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="a link"):
        store.put_blob(b"hello")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "elsewhere" / digest).write_bytes(b"hello")
    with pytest.raises(StoreError, match="a link"):
        store.get_blob(digest, bytes_max=5)
    assert store.list_blobs() == []


def test_invalid_absurd_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    digest = store.put_blob(b"hello")
    with Path(store._blob_path(digest)).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(StoreError, match="longer than"):
        store.get_blob(digest, bytes_max=1 << 20)
    with pytest.raises(CheckpointError, match="prescribes 5"):
        store.read_blob(digest, memoryview(bytearray(5)))
    store.restore_blob(b"hello")


@pytest.mark.parametrize("bomb", [b"[" * 16_000, b'{"a":' * 2_700, b'{"digest":"' + b"9" * 16_000,
                                  b"1" * 16_000, b'"\\ud800"' * 1_000])
def test_invalid_json_bomb_is_one_line(bomb: bytes) -> None:
    for parse in (parse_opening, parse_manifest):
        with pytest.raises(OpeningError):
            parse(bomb)


# -- fsspec


def test_store_through_fsspec_without_atomic_writes_leaves_nothing_behind(tmp_path: Path) -> None:
    """As SFTP: a temporary file, then a move. fsspec's own folder kind stands in for the server."""
    import fsspec

    store = Store(str(tmp_path))
    store._objects = FsspecObjects(fsspec.filesystem("file", auto_mkdir=True), str(tmp_path), link=BRISK)
    digest = store.put_blob(b"hello")
    assert store.get_blob(digest, bytes_max=5) == b"hello"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [digest]


def test_invalid_kind_of_store_and_password_in_its_url() -> None:
    with pytest.raises(StoreError, match="carrier"):
        Store("carrier-pigeon://coop")
    with pytest.raises(StoreError, match="holds a password") as caught:
        Store("sftp://north:hunter2@store.example/swarm")
    assert "hunter2" not in caught.value.message + caught.value.hint
    with pytest.raises(StoreError, match="no name of a bucket"):
        Store("s3://../etc", options={"access_key_id": "a", "secret_access_key": "b"})


# -- S3, on a real server


def test_large_blob_travels_in_parts_and_ranges(seaweed: Seaweed) -> None:
    store = Store("s3://swarm/large", options=seaweed.options(), link=BRISK)
    data = fill(2 * PART + 3 * RANGE + 12_345)
    digest = store.put_blob(data)
    about = seaweed.client().head_object(Bucket="swarm", Key=f"large/blobs/{digest[:2]}/{digest}")
    assert about["ContentLength"] == len(data) and "-" in about["ETag"]
    room = memoryview(bytearray(len(data)))
    store.read_blob(digest, room)
    assert room == data
    assert hashlib.sha256(b"".join(bytes(p) for p in store.stream_blob(digest, len(data)))).hexdigest() == digest
    assert store.get_blob(digest, bytes_max=len(data)) == data
    with pytest.raises(StoreError, match="longer than"):
        store.get_blob(digest, bytes_max=len(data) - 1)
    for size in (len(data) - 1, len(data) + 1):
        with pytest.raises(CheckpointError, match="prescribes"):
            store.read_blob(digest, memoryview(bytearray(size)))
    assert store.bytes_up == len(data)


def test_new_objects_of_others_are_seen_at_once(seaweed: Seaweed) -> None:
    here, there = (Store("s3://swarm/polled", options=seaweed.options(), link=BRISK) for _ in range(2))
    assert not here.has_opening(ZERO) and here.list_blobs() == []
    there.put_opening(ZERO, b"{}")
    digest = there.put_blob(b"news")
    assert here.has_opening(ZERO) and here.list_blobs() == [digest]


def test_invalid_s3_account_bucket_and_server(seaweed: Seaweed) -> None:
    refusals = [
        (seaweed.options("reader"), StoreError, "may not do that", "read and write"),
        (seaweed.options(access_key_id="AKNOBODY"), StoreError, "access key", "credentials"),
        (seaweed.options(secret_access_key="sk-wrong"), StoreError, "secret key", "credentials"),
        (seaweed.options(endpoint_url="http://127.0.0.1:9"), StoreUnreachable, "not answer", "is it up"),
        (seaweed.options(endpoint_url="http://me:sk-me@127.0.0.1:9"), StoreError, "holds a password", "take it out"),
    ]
    for options, kind, words, hint in refusals:
        with pytest.raises(kind, match=words) as caught:
            Store("s3://swarm/x", options=options, link=BRISK).require_writable()
        assert hint in caught.value.hint and "\n" not in caught.value.message
        assert "sk-" not in caught.value.message + caught.value.hint
    with pytest.raises(StoreError, match="no such bucket"):
        Store("s3://nobody-made-this/x", options=seaweed.options(), link=BRISK).get_opening(ZERO)
    reader = Store("s3://swarm/x", options=seaweed.options("reader"), link=BRISK)
    writer = Store("s3://swarm/x", options=seaweed.options(), link=BRISK)
    assert reader.get_blob(writer.put_blob(b"to be read"), bytes_max=10) == b"to be read"


def test_store_is_reached_by_the_environment_a_file_or_a_profile(seaweed: Seaweed, tmp_path: Path) -> None:
    """Three processes, so that this one's environment stays as it is; no secret is an argument or in site.toml."""
    script = ("import sys; from pathlib import Path; from swarmchain.config import read_site_config\n"
              "from swarmchain.store import open_store\n"
              "s = open_store(read_site_config(Path(sys.argv[1]))); s.require_writable(); print('fine')\n")
    named = seaweed.environment()
    (tmp_path / "store.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in seaweed.options().items()))
    (tmp_path / "store.toml").chmod(0o600)
    (tmp_path / "aws").write_text(
        f"[profile swarm]\nendpoint_url = {named['AWS_ENDPOINT_URL']}\nregion = us-east-1\n"
        f"aws_access_key_id = {named['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = {named['AWS_SECRET_ACCESS_KEY']}\n")
    bare = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    for lines, env in (("", named), ('options_file = "store.toml"\n', {}),
                       ('profile = "swarm"\n', {"AWS_CONFIG_FILE": str(tmp_path / "aws")})):
        site = write_site(tmp_path, lines)
        done = subprocess.run([sys.executable, "-c", script, str(site)], env={**bare, **env}, capture_output=True,
                              text=True)
        assert done.stdout == "fine\n", done.stderr


def test_invalid_options_file(tmp_path: Path) -> None:
    options = tmp_path / "store.toml"
    config = read_site_config(write_site(tmp_path, 'options_file = "store.toml"\n'))
    with pytest.raises(ConfigError, match="cannot read"):
        open_store(config)
    for text, mode, words in (("", 0o644, "readable by others"), ("secret = hunter2", 0o600, "not TOML"),
                              ('secret_key = "hunter2"', 0o600, "secret_key: Extra inputs")):
        options.write_text(text)
        options.chmod(mode)
        with pytest.raises(ConfigError, match=words) as caught:
            open_store(config)
        assert "hunter2" not in caught.value.message


def write_site(folder: Path, lines: str) -> Path:
    text = render_site_toml(name="North", rpc_url="http://127.0.0.1:1", deployment="d.json", store="s3://swarm/env")
    site = folder / "site.toml"
    site.write_text(text.replace("[store]\n", f"[store]\n{lines}"))
    return site


# -- the line breaks


class Cutting:
    """Passes bytes on to a server, and cuts a connection after so many bytes from one side, so many times."""

    def __init__(self, port: int, *, up_max: int = 1 << 60, down_max: int = 1 << 60, cuts: int = 2) -> None:
        self._to, self._limits, self.cuts_left = port, (up_max, down_max), cuts
        self.up = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                for source, target, limit in ((near, far, self._limits[0]), (far, near, self._limits[1])):
                    threading.Thread(target=self._pump, args=(source, target, limit, source is near),
                                     daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, limit: int, is_up: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                passed += len(data)
                with self._lock:
                    self.up += len(data) if is_up else 0
                    is_cut = passed > limit and self.cuts_left > 0
                    self.cuts_left -= is_cut
                if is_cut:
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def test_broken_upload_sends_only_the_broken_parts_again(seaweed: Seaweed) -> None:
    line = Cutting(seaweed.port, up_max=PART // 2, cuts=2)
    try:
        store = Store("s3://swarm/cut", options=seaweed.options(endpoint_url=line.url), link=BRISK)
        data = fill(4 * PART)
        digest = store.put_blob(data)
    finally:
        line.close()
    assert line.cuts_left == 0
    assert line.up < len(data) + 3 * PART  # two parts were begun twice, and no more
    Store("s3://swarm/cut", options=seaweed.options()).require_whole(digest)
    uploads = seaweed.client().list_multipart_uploads(Bucket="swarm", Prefix="cut/")
    assert not uploads.get("Uploads")


def test_broken_download_asks_again_for_the_broken_ranges(seaweed: Seaweed) -> None:
    digest = Store("s3://swarm/cut2", options=seaweed.options()).put_blob(data := fill(3 * RANGE))
    line = Cutting(seaweed.port, down_max=RANGE // 2, cuts=2)
    try:
        store = Store("s3://swarm/cut2", options=seaweed.options(endpoint_url=line.url), link=BRISK)
        room = memoryview(bytearray(len(data)))
        store.read_blob(digest, room)
    finally:
        line.close()
    assert room == data and line.cuts_left == 0


# -- a server that is up to no good


class Hostile(ThreadingHTTPServer):
    """Says whatever a test wants it to, over a real socket."""

    daemon_threads = True

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(OSError):
                    super().handle_one_request()

            def answer(self) -> None:
                outer.asked.append(f"{self.command} {self.path}")
                if length := int(self.headers.get("Content-Length", 0)):
                    self.rfile.read(length)
                answer(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

            def log_message(self, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.store = self.open()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def open(self, link: Link = BRISK) -> Store:
        return Store("s3://swarm/x", link=link, options={
            "endpoint_url": self.url, "access_key_id": "a", "secret_access_key": "sk-b"})


@contextlib.contextmanager
def hostile(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[Hostile]:
    with Hostile(answer) as server:
        yield server
        server.shutdown()


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def pour(handler: BaseHTTPRequestHandler, start: bytes = b"", drop: bytes = b"x" * (1 << 16)) -> None:
    handler.wfile.write(start)
    while True:
        handler.wfile.write(drop)


USES: dict[str, Callable[[Store], Any]] = {
    "has": lambda s: s.has_blob(ZERO), "get": lambda s: s.get_blob(ZERO, bytes_max=100),
    "get large": lambda s: s.get_blob(ZERO, bytes_max=1 << 30), "opening": lambda s: s.get_opening(ZERO),
    "read": lambda s: s.read_blob(ZERO, memoryview(bytearray(100))), "list": lambda s: s.list_blobs(),
    "read large": lambda s: s.read_blob(ZERO, memoryview(bytearray(2 * RANGE))),
    "whole": lambda s: s.require_whole(ZERO), "put": lambda s: s._write(s._blob_path(ZERO), b"data"),
}


def test_hostile_redirect_is_not_followed() -> None:
    status = [0]
    with hostile(lambda h: reply(h, 200, b"metadata of a cloud machine")) as inner, \
            hostile(lambda h: reply(h, status[0], Location=f"{inner.url}/latest/meta-data",
                                    x_amz_bucket_region="eu-west-1")) as server:
        for status[0] in (300, 301, 302, 307, 308):
            for use in USES.values():
                with pytest.raises(StoreError, match="not followed"):
                    use(server.store)
        assert inner.asked == []


def test_hostile_region_cannot_lead_to_another_host() -> None:
    body = b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>evil.example/</Region></Error>"
    with hostile(lambda h: reply(h, 400, body, x_amz_bucket_region="evil.example/")) as server, \
            pytest.raises(StoreError):
        server.store.get_opening(ZERO)


def test_hostile_body_without_an_end_is_not_read() -> None:
    """More than was announced, nothing announced, or absurd lengths: the process stays small."""
    def chunked(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        pour(handler, drop=b"10000\r\n" + b"x" * (1 << 16) + b"\r\n")

    def absurd(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(1 << 60))
        handler.end_headers()
        if handler.command != "HEAD":
            pour(handler)

    def error(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(403)
        handler.end_headers()
        pour(handler, b"<Error><Code>")

    def longer(handler: BaseHTTPRequestHandler) -> None:
        reply(handler, 200, b"x" * 100)
        pour(handler)

    before = psutil.Process().memory_info().rss
    for answer, names in ((chunked, ("get", "opening", "read", "list", "put")), (error, ("get", "list", "put")),
                          (absurd, ("get", "get large", "opening", "read", "read large", "list"))):
        with hostile(answer) as server:
            for name in names:
                with pytest.raises(SwarmError):
                    USES[name](server.store)
    with hostile(longer) as server, pytest.raises(StoreError, match="not what its name says"):
        server.store.read_blob(ZERO, memoryview(bytearray(100)))
    assert psutil.Process().memory_info().rss - before < 100 << 20


@pytest.mark.parametrize("said", ["bytes 0-99/100", "bytes 7-8388614/16777216", "bytes 0-8388607/99", "lies", ""])
def test_hostile_range_is_refused(said: str) -> None:
    with hostile(lambda h: reply(h, 206, b"x" * RANGE, Content_Range=said)) as server, \
            pytest.raises(CheckpointError):
        USES["read large"](server.store)


def test_hostile_server_that_ignores_ranges_is_refused() -> None:
    with hostile(lambda h: reply(h, 200, b"x" * (2 * RANGE))) as server, pytest.raises(CheckpointError, match="range"):
        USES["read large"](server.store)


def test_hostile_short_body_is_asked_for_again_and_given_up() -> None:
    def short(handler: BaseHTTPRequestHandler) -> None:
        reply(handler, 200, b"x" * 50, Content_Length="100")
        handler.close_connection = True

    with hostile(short) as server:
        with pytest.raises(StoreUnreachable, match=r"broke off|not answer"):
            server.store.read_blob(ZERO, memoryview(bytearray(100)))
        assert len(server.asked) == BRISK.attempts


def test_hostile_listing() -> None:
    """XML that defines entities, is gigantic, has no end of pages, or names what is no blob."""
    bomb = b"<!DOCTYPE b [<!ENTITY a 'aaaaaaaaaa'>" + b"".join(
        f"<!ENTITY {chr(98 + i)} '{f'&{chr(97 + i)};' * 10}'>".encode() for i in range(9)) + b"]>"
    bomb += b"<ListBucketResult><Name>&j;</Name></ListBucketResult>"
    page = b"<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>" \
        b"</ListBucketResult>"
    item = "<Contents><Key>x/blobs/%s</Key><LastModified>2026-01-01T00:00:00Z</LastModified><Size>1</Size></Contents>"
    odd = "<ListBucketResult>" + "".join(item % key for key in ("../../etc/passwd", "aa/" + "a" * 64, "aa/b")) + \
        "</ListBucketResult>"
    deep = b"<a>" * 500_000
    for body, words in ((bomb, "entities"), (b"<ListBucketResult>" + b" " * (5 << 20), "without an end"),
                        (deep, "cannot list"), (b"\xff\xfe<", "cannot list")):
        with hostile(lambda h, body=body: reply(h, 200, body)) as server, pytest.raises(SwarmError, match=words):
            server.store.list_blobs()
    with hostile(lambda h: reply(h, 200, page)) as server, pytest.raises(StoreError, match="no end"):
        server.store.list_blobs()
    with hostile(lambda h: reply(h, 200, odd.encode())) as server:
        assert server.store.list_blobs() == ["a" * 64]


def test_busy_server_is_asked_again_with_longer_pauses() -> None:
    pauses: list[float] = []
    link = Link(timeout_s=5, attempts=4, pause_s=1.0, pause_max_s=3.0, sleep=pauses.append)
    body = b"<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>"
    with hostile(lambda h: reply(h, 503, body)) as server:
        with pytest.raises(StoreUnreachable, match=r"busy \(SlowDown"):
            server.open(link).get_opening(ZERO)
        assert len(server.asked) == 4
    assert len(pauses) == 3
    assert all(full / 2 <= pause <= full for pause, full in zip(pauses, (1.0, 2.0, 3.0), strict=True))
    with hostile(lambda h: reply(h, 200, b"fine") if len(server.asked) > 2 else reply(h, 500, b"")) as server:
        assert server.open(link).get_opening(ZERO) == b"fine"


@pytest.mark.parametrize("code, words", [("RequestTimeTooSkewed", "clock is off"), ("NoSuchBucket", "no such bucket"),
                                         ("ExpiredToken", "token has expired"), ("QuotaExceeded", "full"),
                                         ("Rätsel\n\x1b[31m", "answers 400"), ("PermanentRedirect", "elsewhere")])
def test_refusal_of_an_s3_server_is_one_line_with_a_remedy(code: str, words: str) -> None:
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code></Error>".replace("\x1b", "").encode()
    with hostile(lambda h: reply(h, 400, body)) as server, pytest.raises(SwarmError, match=words) as caught:
        server.store.get_opening(ZERO)
    assert caught.value.hint and re.fullmatch(r"[^\n\x1b]*", caught.value.message)


def test_outsider_without_credentials_reads_nothing(seaweed: Seaweed) -> None:
    import urllib3

    digest = Store("s3://swarm/closed", options=seaweed.options()).put_blob(b"not for everyone")
    answer = urllib3.request("GET", f"{seaweed.endpoint_url}/swarm/closed/blobs/{digest[:2]}/{digest}", retries=False)
    assert answer.status == 403
