"""Hosts of their own on one machine: network namespaces on a bridge, each with an address, a user, and a link to cut.

Only root of a machine with iproute2 can make them; `find_obstacle` says what is in the way. Nothing leaves the
namespaces: the bridge lies in one of its own, without any way out.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

NETWORK = "10.77.0"
FIRST_UID = 61_000


def find_obstacle() -> str:
    """Why no hosts can be made here; empty if they can. Makes one, with all that a test asks of it."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "tc", "setpriv", "mount"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    try:
        with start_lab(["probe"]) as lab:
            host = lab.hosts["probe"]
            lab.slow(host, rate="1mbit")
            lab.cut(host)
            lab.restore(host)
            code, said = host.ask(sys.executable, "-c", "import swarmchain")
    except subprocess.CalledProcessError as exc:
        return f"{' '.join(exc.cmd)}: {exc.stderr.strip()}"
    return f"a user of its own cannot run this Python there: {said.strip()}" if code else ""


@dataclass
class Host:
    """One host: a namespace, an address, a user of its own, and a home that only that user may read."""

    lab: str
    name: str
    address: str
    uid: int
    home: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return f"{self.lab}-{self.name}"

    @property
    def port(self) -> str:
        """The bridge's end of this host's link."""
        return f"p-{self.name}"

    def start(self, *words: object, env: Mapping[str, str] | None = None, log: str = "") -> subprocess.Popen[str]:
        """Run a program on this host, as its user, in its home; the output goes into a file there, or to the caller."""
        script = _OPENED + (
            f"cd {shlex.quote(str(self.home))} && exec setpriv --reuid {self.uid} --regid {self.uid} --clear-groups "
            f"--no-new-privs {shlex.join(map(str, words))}")
        bare = {"PATH": os.environ["PATH"], "HOME": str(self.home), "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1",
                "OMP_NUM_THREADS": "1", "NUMBA_CACHE_DIR": str(self.home / ".numba"), **(env or {})}
        with contextlib.ExitStack() as opened:
            output = opened.enter_context((self.home / log).open("a")) if log else subprocess.PIPE
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "sh", "-c", script], env=bare, text=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT if log else subprocess.PIPE,
                start_new_session=True)
        self.processes.append(process)
        return process

    def call(self, *words: object, env: Mapping[str, str] | None = None, code: int = 0) -> str:
        """Run a program on this host and wait for it; what it said."""
        found, said = self.ask(*words, env=env)
        assert found == code, f"{self.name}: {words}: {said}"
        return said

    def ask(self, *words: object, env: Mapping[str, str] | None = None) -> tuple[int, str]:
        """As `call`, with the exit code whatever it is."""
        process = self.start(*words, env=env)
        said, errors = process.communicate(timeout=120)
        return process.returncode, said + errors

    def receive(self, path: Path, name: str) -> Path:
        """A file that was handed to this host: its user's, and nobody else's to read."""
        target = self.home / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        for found in (target.parent, target):
            os.chown(found, self.uid, self.uid)
        target.chmod(0o600)
        return target


@dataclass
class Lab:
    """All hosts, and the bridge that joins them."""

    name: str
    hosts: dict[str, Host]

    def cut(self, host: Host) -> None:
        """Pull the cable."""
        _ip("-n", self.name, "link", "set", host.port, "down")

    def restore(self, host: Host) -> None:
        """Plug it in again."""
        _ip("-n", self.name, "link", "set", host.port, "up")

    def slow(self, host: Host, *, rate: str) -> None:
        """Let no more than `rate` (as tc writes it) through, either way."""
        for namespace, device in ((self.name, host.port), (host.namespace, "eth0")):
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate, "burst", "16k",
                 "latency", "400ms")


@contextlib.contextmanager
def start_lab(names: list[str]) -> Iterator[Lab]:
    """Hosts with these names while the context lasts; every process on them is ended, every namespace removed."""
    lab = Lab(f"swarm-{uuid.uuid4().hex[:6]}", {})
    with contextlib.ExitStack() as made:
        # not pytest's folder: that one lies in another that is root's alone
        folder = Path(made.enter_context(tempfile.TemporaryDirectory(prefix="swarm-lab-")))
        folder.chmod(0o711)
        _make_namespace(made, lab.name)
        _ip("-n", lab.name, "link", "add", "bridge", "type", "bridge")
        _ip("-n", lab.name, "link", "set", "bridge", "up")
        for i, name in enumerate(names):
            home = folder / name
            home.mkdir(mode=0o700)
            host = Host(lab.name, name, f"{NETWORK}.{10 + i}", FIRST_UID + i, home)
            os.chown(home, host.uid, host.uid)
            _make_namespace(made, host.namespace)
            made.callback(_end, host)
            _ip("-n", lab.name, "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns",
                host.namespace)
            _ip("-n", lab.name, "link", "set", host.port, "master", "bridge", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", device, "up")
            lab.hosts[name] = host
        yield lab


def _make_namespace(made: contextlib.ExitStack, name: str) -> None:
    _ip("netns", "add", name)
    made.callback(_ip, "netns", "del", name)


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


def _end(host: Host) -> None:
    for process in host.processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    for process in host.processes:
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _open_folders() -> str:
    """Shell words that let the hosts' users reach Python and this repository, in the namespace of one process.

    Where these lie in a folder of root's own (pyenv in /root), that folder is covered by an empty one, in which only
    they show: `ip netns exec` gives every process mounts of its own.
    """
    wanted = [Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), Path(__file__).resolve().parent.parent]
    closed: dict[Path, list[Path]] = {}
    for path in wanted:
        if outermost := next((p for p in reversed(path.parents) if p.stat().st_mode & 0o001 == 0), None):
            closed.setdefault(outermost, []).append(path)
    words = []
    for outermost, paths in closed.items():
        kept = {path: f"/run/swarm-lab-{i}" for i, path in enumerate(paths)}
        words += [f"mkdir -p {place} && mount --bind {shlex.quote(str(path))} {place}" for path, place in kept.items()]
        words.append(f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(outermost))}")
        words += [f"mkdir -p {shlex.quote(str(path))} && mount --bind {place} {shlex.quote(str(path))}"
                  for path, place in kept.items()]
        words += [f"umount {place}" for place in kept.values()]
    return "".join(f"{word} && " for word in words)


_OPENED = _open_folders()
