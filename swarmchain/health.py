"""Whether an agent is well, for a supervisor, and its numbers, for Prometheus; over HTTP, for whoever may listen.

    /healthz    200 while the agent's loop turns, 503 while it is stuck or waits for chain or store; JSON
    /metrics    counters and gauges in Prometheus' text format

The agent's thread writes, the server's threads read. Nothing here tells of cells: rounds, seconds, bytes, gas, scores.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from swarmchain import __version__
from swarmchain.errors import ConfigError
from swarmchain.protocol import Phase, RunView

# An idle loop turns four times a second; one look may have to wait for every node's timeout.
STILL_MAX_S = 120.0
# Pauses after a failure are 30 s at most, and the failure is told again after each.
AWAY_S = 45.0
REQUEST_TIMEOUT_S = 10.0
LOOPBACK = "127.0.0.1"
CONTENT = "text/plain; version=0.0.4; charset=utf-8"
TROUBLES = ("unreachable", "refused", "stalled", "too slow", "too few", "lost", "cannot", "unverifiable", "MISMATCH")


class Monitor:
    """What an agent did and when it last turned, as its events and its loop tell.

    Parameters
    ----------
    clock
        Seconds that only grow.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._turned = self._head_seen = clock()
        self._head = -1
        self._allowed_s = STILL_MAX_S
        self._duty = ""
        self._away: tuple[float, str] = (float("-inf"), "")
        self._closed: set[tuple[int, int]] = set()
        self._counted: Counts[tuple[str, str]] = Counts()
        self._bytes = {"up": 0, "down": 0}
        self.registry = CollectorRegistry()
        named = {"registry": self.registry, "namespace": "swarmchain"}
        self._rounds = Counter("rounds", "Rounds that ended, by outcome.", ["run", "outcome"], **named)  # type: ignore[arg-type]
        self._seconds = Counter("work_seconds", "Time spent, by kind of work.", ["kind"], **named)  # type: ignore[arg-type]
        self._sent = Counter("store_bytes", "Bytes to and from the store.", ["direction"], **named)  # type: ignore[arg-type]
        self._gas = Counter("gas", "Gas used, by call.", ["call"], **named)  # type: ignore[arg-type]
        self._troubles = Counter("troubles", "What went wrong, by event.", ["event"], **named)  # type: ignore[arg-type]
        self._phase = Gauge("phase", "0 none, 1 commit, 2 vote, 3 closed.", ["run"], **named)  # type: ignore[arg-type]
        self._round = Gauge("round", "Newest round.", ["run"], **named)  # type: ignore[arg-type]
        self._score = Gauge("score", "This site's last macro-F1.", ["run"], **named)  # type: ignore[arg-type]
        Gauge("head_age_seconds", "Since a new block was seen.", **named).set_function(self._age_of_head)  # type: ignore[arg-type]
        Gauge("loop_age_seconds", "Since the loop turned.", **named).set_function(self._age_of_loop)  # type: ignore[arg-type]
        Gauge("healthy", "1 if /healthz says 200.", **named).set_function(lambda: float(self.judge()[0]))  # type: ignore[arg-type]
        Gauge("build", "Always 1.", ["version"], **named).labels(__version__).set(1)  # type: ignore[arg-type]
        for trouble in TROUBLES:
            self._troubles.labels(trouble)

    def take(self, event: Mapping[str, Any]) -> None:
        """Take one event of the agent's log."""
        kind, run = event["event"], str(event.get("run", ""))
        if kind in TROUBLES:
            self._troubles.labels(kind).inc()
        with self._lock:
            if kind in ("unreachable", "stalled"):
                self._away = (self._clock(), str(event.get("reason", kind)))
            elif "duty" in event:
                self._away = (float("-inf"), "")
        if event.get("gas"):
            self._gas.labels({"committed": "commit", "voted": "vote"}.get(kind, kind)).inc(event["gas"])
        if kind == "ended":
            # a run that is over is seen no more, nor are rounds that passed while the agent was down
            for outcome, total in event["rounds"].items():
                self._count(run, outcome, max(0, total - self._counted[run, outcome]))
        if kind == "voted":
            if event.get("score") is not None:
                self._score.labels(run).set(event["score"])
            for work, seconds in event.get("timing_s", {}).items():
                self._seconds.labels(work).inc(seconds)

    def turn(self, *, head: int, views: Iterable[RunView], sent: Mapping[str, int]) -> None:
        """The loop turned: the newest block, the runs as they were last seen, bytes to and from the store so far."""
        with self._lock:
            self._turned, self._duty, self._allowed_s = self._clock(), "", STILL_MAX_S
            if head != self._head:
                self._head, self._head_seen = head, self._turned
        for view in views:
            self._phase.labels(str(view.run)).set(int(view.phase))
            self._round.labels(str(view.run)).set(view.round_id)
            if view.phase is Phase.CLOSED and view.round_id and (view.run, view.round_id) not in self._closed:
                self._closed.add((view.run, view.round_id))
                self._count(str(view.run), view.outcome.name.lower(), 1)
        for direction, count in sent.items():
            self._sent.labels(direction).inc(max(0, count - self._bytes[direction]))
            self._bytes[direction] = count

    def _count(self, run: str, outcome: str, rounds: int) -> None:
        self._rounds.labels(run, outcome).inc(rounds)
        self._counted[run, outcome] += rounds

    def begin(self, duty: str, allowed_s: float) -> None:
        """A duty begins, which may take so long without a turn of the loop."""
        with self._lock:
            self._turned, self._duty, self._allowed_s = self._clock(), duty, max(allowed_s, STILL_MAX_S)

    def judge(self) -> tuple[bool, dict[str, Any]]:
        """Whether the agent is well, and what there is to say of it."""
        with self._lock:
            now = self._clock()
            still, away = now - self._turned, now - self._away[0] < AWAY_S
            state, reason = "ok", ""
            if still > self._allowed_s:
                state, reason = "stuck", f"no turn of the loop for {still:.0f} s"
            elif away:
                state, reason = "waiting", self._away[1]
            return state == "ok", {"state": state, "reason": reason, "duty": self._duty, "head": self._head,
                                   "loop_age_s": round(still, 1), "version": __version__}

    def _age_of_head(self) -> float:
        with self._lock:
            return self._clock() - self._head_seen

    def _age_of_loop(self) -> float:
        with self._lock:
            return self._clock() - self._turned


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `host:port`, `[ipv6]:port` or `:port`, which is on this machine alone. Raises `ConfigError`."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65_535 or "/" in host:
        raise ConfigError(f"[agent] metrics: {text!r} is no host:port", hint=f'for example "{LOOPBACK}:9464"')
    return host.removeprefix("[").removesuffix("]") or LOOPBACK, int(port)


@contextlib.contextmanager
def serve(monitor: Monitor, address: str) -> Iterator[tuple[str, int]]:
    """Answer at `address` while the context lasts; yields host and port, which was chosen if 0 was asked for.

    Raises
    ------
    ConfigError
        If the address is none, or cannot be used.
    """
    host, port = parse_address(address)

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True

    try:
        server = Server((host, port), _make_handler(monitor))
    except OSError as exc:
        raise ConfigError(f"[agent] metrics: cannot listen at {host}:{port}: {exc.strerror}",
                          hint="is the port taken? 0 takes a free one") from exc
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield host, server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _make_handler(monitor: Monitor) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_S
        server_version, sys_version = "swarmchain", ""

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, generate_latest(monitor.registry), CONTENT)
            elif self.path == "/healthz":
                is_well, told = monitor.judge()
                self._answer(200 if is_well else 503, json.dumps(told).encode() + b"\n", "application/json")
            else:
                self._answer(404, b"/healthz or /metrics\n", "text/plain")

        def _answer(self, status: int, data: bytes, content: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing: the agent's log is for its duties."""

    return Handler
