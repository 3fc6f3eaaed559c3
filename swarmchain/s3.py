"""An S3 object store: Amazon's, SeaweedFS, MinIO, or any other.

botocore knows credentials, regions, signatures and errors. What a hostile or broken server could do with it is bounded
here: no answer but an object's own bytes is read beyond `ANSWER_BYTES_MAX`, an object is read only after its announced
length was found right, no redirect leads to another host, and no request takes for ever. Large objects travel in
ranges and parts, several at a time, each repeated by itself where the line breaks.
"""

from __future__ import annotations

import io
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from functools import cache, partial
from typing import Any
from urllib.parse import urlsplit

import botocore.session
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.httpsession import URLLib3Session
from botocore.utils import get_environ_proxies
from urllib3.exceptions import HTTPError

from swarmchain.checkpoint import Buffer
from swarmchain.errors import BlobMissing, CheckpointError, StoreError, StoreFull, StoreUnreachable, SwarmError
from swarmchain.objects import PATIENT, Found, Link, describe, require_countable, require_exact, require_size
from swarmchain.protocol import Strict

ANSWER_BYTES_MAX = 4 << 20
RANGE = 8 << 20
PART = 16 << 20  # Amazon takes 10,000 parts of at least 5 MiB
RATE_MIN = 16 << 10  # bytes a second: what is slower is as good as silent
PAGES_SPARE = 100
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
_MISSING = {"404", "NoSuchKey", "NotFound"}
_BUSY = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded", "InternalError",
         "ServiceUnavailable", "OperationAborted", "TooManyRequests", "429"}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "507"}
_WORDS: dict[str, tuple[str, str]] = {
    "AccessDenied": ("this account may not do that", "ask who operates the store for read and write on this prefix"),
    "403": ("this account may not do that", "ask who operates the store for read, write and list on this prefix"),
    "NoSuchBucket": ("there is no such bucket", "correct [store] url, or create the bucket"),
    "InvalidAccessKeyId": ("the store does not know this access key", "correct the credentials; docs/store.md"),
    "SignatureDoesNotMatch": ("the secret key is not that of the access key", "correct the credentials; docs/store.md"),
    "ExpiredToken": ("the session token has expired", "fetch a new one"),
    "RequestTimeTooSkewed": ("this machine's clock is off", "set the clock (NTP): the store takes signatures of its "
                                                            "own time only"),
    "AuthorizationHeaderMalformed": ("the bucket is in another region", "set the region: AWS_DEFAULT_REGION"),
    "PermanentRedirect": ("the bucket is elsewhere", "set the region or endpoint_url; a redirect is not followed"),
}


class S3Options(Strict):
    """The file that `[store] options_file` names, for S3. What it leaves out botocore finds as it always does."""

    endpoint_url: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None
    region: str | None = None
    ca_file: str | None = None


class S3Objects:
    """Bytes by path in a bucket.

    Parameters
    ----------
    root
        Bucket, and the prefix under which all paths lie.
    profile
        Name of a profile in the standard AWS files.

    Raises
    ------
    StoreError
        If the bucket's name is none, or no credentials are to be found.
    """

    def __init__(self, root: str, options: S3Options, *, profile: str | None = None, link: Link = PATIENT) -> None:
        self.root = root
        self._link = link
        if not _BUCKET.fullmatch(bucket := root.partition("/")[0]):
            raise StoreError(f"{bucket!r} is no name of a bucket", hint="[store] url is s3://bucket/prefix")
        session = _open_session(profile)
        # no checksums that older servers refuse: every blob is hashed by us
        config = Config(signature_version="s3v4", retries={"total_max_attempts": 1, "mode": "standard"},
                        request_checksum_calculation="when_required", response_checksum_validation="when_required")
        try:
            self._client = session.create_client(
                "s3", config=config, region_name=options.region or session.get_config_variable("region") or "us-east-1",
                endpoint_url=options.endpoint_url, aws_access_key_id=options.access_key_id,
                aws_secret_access_key=options.secret_access_key, aws_session_token=options.session_token)
        except (BotoCoreError, ValueError) as exc:
            raise StoreError(f"store s3://{root}: {exc}", hint="docs/store.md shows the settings") from exc
        self._url = self._client.meta.endpoint_url
        host = urlsplit(self._url).netloc
        if "@" in host:
            raise StoreError("the endpoint_url of the store holds a password", hint="take it out: access_key_id and "
                             "secret_access_key are the place for it; docs/store.md")
        self._hosts = {host, f"{bucket}.{host}"}
        self._http = URLLib3Session(
            verify=options.ca_file or session.get_config_variable("ca_bundle") or True,
            proxies=get_environ_proxies(self._url), timeout=(min(link.timeout_s, 10.0), link.timeout_s),
            max_pool_connections=4 * link.threads)
        self._client.meta.events.register("before-send.s3", self._send)
        # apart: whoever waits for ranges in one of the first must not take the place of the ranges
        self._pool = ThreadPoolExecutor(link.threads, thread_name_prefix="s3")

    def exists(self, path: str) -> bool:
        """Whether an object is there."""
        try:
            self._ask("look for", path, lambda: self._client.head_object(**_name(path)))
        except BlobMissing:
            return False
        return True

    def read(self, path: str, *, bytes_max: int) -> bytes:
        """A whole object."""
        if bytes_max <= RANGE:
            return bytes(self._ask("read", path, lambda: self._get_small(path, bytes_max)))
        size = self._read_size(path)
        require_size(path, size, bytes_max)
        data = memoryview(bytearray(size))
        for _ in self.stream(path, size, data):
            pass
        return bytes(data)

    def stream(self, path: str, size: int | None, into: memoryview | None = None) -> Iterator[memoryview]:
        """An object in ranges: several are under way while one is used."""
        if size is None:
            size = self._read_size(path)
        if size <= RANGE:
            room = memoryview(bytearray(size)) if into is None else into
            self._ask("read", path, lambda: self._get(path, 0, room, size=size, is_whole=True))
            yield room
            return
        ahead = self._link.threads + 1
        ring = [memoryview(bytearray(RANGE)) for _ in range(ahead)] if into is None else []
        waiting: deque[tuple[memoryview, Future[Any]]] = deque()
        starts = iter(range(0, size, RANGE))
        try:
            while True:
                while len(waiting) < ahead and (start := next(starts, None)) is not None:
                    length = min(RANGE, size - start)
                    room = ring[start // RANGE % ahead][:length] if into is None else into[start : start + length]
                    fetch = partial(self._get, path, start, room, size=size)
                    waiting.append((room, self._pool.submit(self._ask, "read", path, fetch)))
                if not waiting:
                    return
                room, future = waiting[0]
                future.result()
                yield room
                waiting.popleft()  # only now may its room be filled anew
        finally:
            _settle([future for _, future in waiting])

    def write(self, path: str, data: Buffer) -> None:
        """One request, or parts that become an object when all are there."""
        if len(data) <= 2 * PART:
            body = data if isinstance(data, bytes | bytearray) else bytes(data)
            self._ask("write", path, lambda: self._client.put_object(**_name(path), Body=body))
            return
        upload = self._ask("write", path, lambda: self._client.create_multipart_upload(**_name(path)))["UploadId"]
        view, futures = memoryview(data), []
        try:
            for number, start in enumerate(range(0, len(view), PART), 1):
                futures.append(self._pool.submit(self._put_part, path, upload, number, view[start : start + PART]))
            parts = [future.result() for future in futures]
            self._ask("write", path, lambda: self._client.complete_multipart_upload(
                **_name(path), UploadId=upload, MultipartUpload={"Parts": parts}))
        except BaseException:
            _settle(futures)
            with suppress(SwarmError):
                self._ask("write", path, lambda: self._client.abort_multipart_upload(**_name(path), UploadId=upload),
                          is_once=True)
            raise

    def remove(self, path: str) -> None:
        """Take an object away."""
        with suppress(BlobMissing):
            self._ask("remove", path, lambda: self._client.delete_object(**_name(path)))

    def list(self, path: str) -> Iterator[Found]:
        """All objects below a path, page by page."""
        bucket, prefix = path.split("/", 1)
        about: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{prefix}/"}
        count = pages = 0
        # a server that gives page after page with nothing on it has no end
        while (pages := pages + 1) <= PAGES_SPARE + count // 100:
            page = self._ask("list", path, lambda: self._client.list_objects_v2(**about))
            for item in page.get("Contents", ()):
                if not item["Key"].startswith(about["Prefix"]):
                    continue
                require_countable(path, count := count + 1)
                yield Found(f"{bucket}/{item['Key']}", int(item["Size"]), item["LastModified"].timestamp())
            if not page.get("IsTruncated") or not page.get("NextContinuationToken"):
                return
            about["ContinuationToken"] = page["NextContinuationToken"]
        raise StoreError(f"the listing of {path} has no end", hint="ask who operates the store")

    def _put_part(self, path: str, upload: str, number: int, data: memoryview) -> dict[str, Any]:
        body = bytes(data)
        about = {**_name(path), "UploadId": upload, "PartNumber": number}
        answer = self._ask("write", path, lambda: self._client.upload_part(**about, Body=body))
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _read_size(self, path: str) -> int:
        answer = self._ask("read", path, lambda: self._client.head_object(**_name(path)))
        return _require_length(path, answer)

    def _get_small(self, path: str, bytes_max: int) -> bytearray:
        answer = self._client.get_object(**_name(path))
        with closing(answer["Body"]) as body:
            size = _require_length(path, answer)
            require_size(path, size, bytes_max)
            data = bytearray(size)
            self._fill(path, body, memoryview(data))
        return data

    def _get(self, path: str, start: int, into: memoryview, *, size: int, is_whole: bool = False) -> None:
        """Fill `into` with an object's bytes from `start` on, if the object has `size` bytes in all."""
        span = {} if is_whole else {"Range": f"bytes={start}-{start + len(into) - 1}"}
        answer = self._client.get_object(**_name(path), **span)
        with closing(answer["Body"]) as body:
            length = _require_length(path, answer)
            if is_whole:
                require_exact(path, length, size)
            else:
                _require_range(path, answer.get("ContentRange", ""), (start, start + len(into) - 1), size)
                require_exact(path, length, len(into))
            self._fill(path, body, into)

    def _fill(self, path: str, body: Any, into: memoryview) -> None:
        """Read exactly as many bytes as there is room for, and not one more."""
        end, at = time.monotonic() + self._link.timeout_s + len(into) / RATE_MIN, 0
        while at < len(into):
            count = body.readinto(into[at : at + (1 << 20)])
            if not count:
                raise StoreUnreachable(f"{describe(path)} broke off after {at} of {len(into)} bytes",
                                       hint="is the network to the store in order?")
            at += count
            if time.monotonic() > end:
                raise StoreUnreachable(f"{describe(path)} comes at less than {RATE_MIN >> 10} KiB/s",
                                       hint="is the network to the store in order?")

    def _ask(self, verb: str, path: str, call: Callable[[], Any], *, is_once: bool = False) -> Any:
        """One request with its answer, repeated while that may help; every foreign error becomes ours here."""
        def translate() -> Any:
            try:
                return call()
            except SwarmError:
                raise
            except ClientError as exc:
                raise self._translate(exc, verb, path) from exc
            except (NoCredentialsError, PartialCredentialsError) as exc:
                raise StoreError(f"no credentials for {self._url}", hint="set AWS_ACCESS_KEY_ID and "
                                 "AWS_SECRET_ACCESS_KEY, or [store] options_file; docs/store.md") from exc
            except SSLError as exc:
                raise StoreError(f"the certificate of {self._url} is not trusted, or it speaks no TLS",
                                 hint="ca_file in [store] options_file, or AWS_CA_BUNDLE, names the authority") from exc
            except (BotoConnectionError, HTTPClientError, IncompleteReadError, HTTPError, OSError) as exc:
                raise StoreUnreachable(f"cannot {verb} {describe(path)}: {self._url} does not answer",
                                       hint="is it up, and does the network reach it?") from exc
            except (BotoCoreError, ValueError, KeyError, TypeError) as exc:
                raise StoreError(f"cannot {verb} {describe(path)}: {self._url} answers what no S3 store would",
                                 hint="is endpoint_url that of an S3 server?") from exc

        return translate() if is_once else self._link.retrying()(translate)

    def _translate(self, exc: ClientError, verb: str, path: str) -> SwarmError:
        code = str(exc.response.get("Error", {}).get("Code", ""))[:64]
        status = int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        where = f"cannot {verb} {describe(path)} in s3://{self.root}"
        if code in _MISSING:
            return BlobMissing(f"{describe(path)} is not in s3://{self.root}")
        if code in _FULL or status == 507:
            return StoreFull(f"{where}: it is full", hint="free space in the store, or raise its quota")
        if code in _BUSY or status >= 500 or status == 429:
            return StoreUnreachable(f"{where}: the store is busy ({code or status})", hint="try again later")
        words, hint = _WORDS.get(code, (f"it answers {code if code.isalnum() else status}", "docs/store.md"))
        return StoreError(f"{where}: {words}", hint=hint)

    def _send(self, request: Any, **_: Any) -> AWSResponse:
        """Send one signed request; of what is no object's bytes only a bounded answer is read."""
        if urlsplit(request.url).netloc not in self._hosts:
            raise StoreError(f"the store {self._url} leads to another host: not followed",
                             hint="correct endpoint_url or the region")
        # to ask first whether a body is welcome takes longer than to send it; the header is not signed
        if "Expect" in request.headers:
            del request.headers["Expect"]
        wants_stream, request.stream_output = request.stream_output, True
        answer = self._http.send(request)
        if 300 <= answer.status_code < 400:
            answer.raw.close()
            raise StoreError(f"the store {self._url} answers with a redirect: not followed",
                             hint="correct endpoint_url or the region")
        if wants_stream and answer.status_code < 300:
            return answer
        return AWSResponse(answer.url, answer.status_code, answer.headers, _Raw(self._read_bounded(answer.raw)))

    def _read_bounded(self, raw: Any) -> bytes:
        end, parts, size = time.monotonic() + self._link.timeout_s, [], 0
        while part := raw.read(64 << 10):
            parts.append(part)
            size += len(part)
            if size > ANSWER_BYTES_MAX or time.monotonic() > end:
                raw.close()
                raise StoreError(f"the store {self._url} answers without an end: not read further",
                                 hint="is endpoint_url that of an S3 server?")
        raw.release_conn()
        data = b"".join(parts)
        if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
            raise StoreError(f"the store {self._url} answers with XML that defines entities: not read",
                             hint="no S3 server does that; ask who operates it")
        return data


class _Raw(io.BytesIO):
    """A body that was read already, as botocore expects it."""

    def stream(self, **_: Any) -> Iterator[bytes]:
        while part := self.read(64 << 10):
            yield part


@cache
def _open_session(profile: str | None) -> Any:
    """One for all: it reads the description of S3 only once."""
    return botocore.session.Session(profile=profile)


def _name(path: str) -> dict[str, str]:
    bucket, key = path.split("/", 1)
    return {"Bucket": bucket, "Key": key}


def _require_length(path: str, answer: dict[str, Any]) -> int:
    length = answer.get("ContentLength")
    if not isinstance(length, int) or length < 0:
        raise StoreError(f"the store names no length of {describe(path)}: not read", hint="is it an S3 server?")
    return length


def _require_range(path: str, said: str, span: tuple[int, int], size: int) -> None:
    """Whether the store says that these are the bytes that were asked for, and how many there are in all."""
    found = _CONTENT_RANGE.fullmatch(said)
    if found is None:
        raise CheckpointError(f"the store does not send the range of {describe(path)} that was asked for")
    first, last, total = (int(number) for number in found.groups())
    require_exact(path, total, size)
    if (first, last) != span:
        raise CheckpointError(f"the store does not send the range of {describe(path)} that was asked for")


def _settle(futures: list[Future[Any]]) -> None:
    """Let none of them write into room that is given back."""
    for future in futures:
        future.cancel()
    for future in futures:
        if not future.cancelled():
            with suppress(SwarmError):
                future.result()
