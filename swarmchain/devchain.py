"""A development chain on this machine: Anvil, or Hardhat's node, on a port that it binds itself.

Gas is free and blocks come with transactions, as on a permissioned chain with a zero base fee. Nothing is kept: when
the process stops, the chain is gone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from swarmchain.errors import DevchainError, SwarmError
from swarmchain.node import Node

Engine = Literal["anvil", "hardhat"]
START_TIMEOUT_S = 60.0
CLIENTS = {"anvil": "anvil/", "hardhat": "HardhatNetwork/"}


@dataclass(frozen=True)
class Devchain:
    """A running dev chain."""

    rpc_url: str
    chain_id: int
    client: str
    process: subprocess.Popen[str] = field(repr=False)

    def is_alive(self) -> bool:
        """Whether the chain's process still runs."""
        return self.process.poll() is None


@contextlib.contextmanager
def start_devchain(engine: Engine = "anvil", *, port: int = 0, options: Sequence[str] = ()) -> Iterator[Devchain]:
    """Run a dev chain while the context lasts; `port` 0 takes a free one, `options` go to Anvil as they are.

    Raises
    ------
    DevchainError
        If the engine is not installed, the port is taken, or no chain comes up.
    """
    command = _build_command(engine, _require_free(port), options)
    # A session of its own: Ctrl-C in the terminal reaches us alone, and we stop it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        cwd=find_project() if engine == "hardhat" else None,
        env={**os.environ, "HARDHAT_DISABLE_TELEMETRY_PROMPT": "true"},
    )
    try:
        rpc_url = _await_listening(process, engine)
        threading.Thread(target=_drain, args=(process,), daemon=True).start()
        node = Node(rpc_url)
        if not node.client_version.startswith(CLIENTS[engine]):
            raise DevchainError(f"{rpc_url} is answered by {node.client_version}, not by {engine}")
        yield Devchain(rpc_url, node.chain_id, node.client_version, process)
    finally:
        stop_process(process)


def stop_process(process: subprocess.Popen[str], *, timeout_s: float = 5.0) -> None:
    """End a process that we started, with the session that it leads; kill what does not end in time."""
    for step in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, step)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=timeout_s)
            break
    if process.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            process.stdout.close()


def find_anvil() -> Path:
    """Anvil's binary: `SWARMCHAIN_ANVIL`, else npm's package of this project, else the PATH. Raises `DevchainError`."""
    if named := os.environ.get("SWARMCHAIN_ANVIL"):
        if not os.access(named, os.X_OK):
            raise DevchainError(f"SWARMCHAIN_ANVIL names {named}, which cannot be executed", hint="correct or unset it")
        return Path(named)
    for folder in _node_modules():
        if found := sorted(folder.glob("@foundry-rs/anvil-*/bin/anvil*")):
            return found[0]
    if on_path := shutil.which("anvil"):
        return Path(on_path)
    raise DevchainError("Anvil is not installed", hint="`npm ci` in the project's folder, or install Foundry")


def find_project() -> Path:
    """The folder with hardhat.config.js and its node_modules. Raises `DevchainError`."""
    for folder in _node_modules():
        if (folder.parent / "hardhat.config.js").is_file() and (folder / "hardhat").is_dir():
            return folder.parent
    raise DevchainError("Hardhat is not installed", hint="`npm ci` in the project's folder")


def _node_modules() -> list[Path]:
    starts = [Path.cwd(), Path(__file__).resolve().parent]
    return [p / "node_modules" for start in starts for p in (start, *start.parents) if (p / "node_modules").is_dir()]


def _build_command(engine: Engine, port: int, options: Sequence[str]) -> list[str]:
    if engine == "anvil":
        return [str(find_anvil()), "--host", "127.0.0.1", "--port", str(port), "--gas-price", "0",
                "--block-base-fee-per-gas", "0", *options]
    node = shutil.which("node")
    if node is None:
        raise DevchainError("Node.js is not installed", hint="install Node 20 or later, or use --engine anvil")
    script = find_project() / "node_modules" / "hardhat" / "internal" / "cli" / "bootstrap.js"
    return [node, str(script), "node", "--hostname", "127.0.0.1", "--port", str(port or _free_port())]


def _require_free(port: int) -> int:
    if port:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as exc:
                raise DevchainError(
                    f"port {port} cannot be used: {exc.strerror}", hint="choose another with --port; 0 is any free one"
                ) from exc
    return port


def _free_port() -> int:
    # Hardhat prints the port it was asked for, so 0 would tell us nothing. Whoever takes the port in between makes
    # it fail to start, which is reported; the client's name is checked in any case.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_listening(process: subprocess.Popen[str], engine: Engine) -> str:
    """The URL, once the chain says that it listens."""
    lines: list[str] = []
    found: list[str] = []

    def read() -> None:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            if match := re.search(r"(?:Listening on |server at https?://)([\d.]+:\d+)", line):
                found.append(f"http://{match[1]}")
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(START_TIMEOUT_S)
    if found:
        return found[0]
    reason = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    raise DevchainError(f"{engine} did not start: {reason}", hint="is the port free, and is the installation whole?")


def _drain(process: subprocess.Popen[str]) -> None:
    """Read on, so that a full pipe never stops the chain."""
    with contextlib.suppress(OSError, ValueError):
        for _ in process.stdout or ():
            pass


def wait_until_gone(rpc_url: str, *, timeout_s: float) -> bool:
    """Whether nothing answers at `rpc_url` any more within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            Node(rpc_url, timeout_s=1)
        except SwarmError:
            return True
        time.sleep(0.1)
    return False
