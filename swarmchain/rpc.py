"""JSON-RPC over HTTP to one chain through several nodes: the first that is healthy answers.

A node that does not answer in time, answers with an HTTP error, or turns out to be on another chain is passed over for
a while, and the next one is asked. Every question may be asked twice: reads change nothing, and a transaction that two
nodes know is one transaction.

A URL may hold a user and password, which are sent as basic authentication, or a token in its path or query. Nothing of
that is ever shown: messages name a node by its host.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import urllib3
from web3.providers.base import JSONBaseProvider
from web3.types import RPCEndpoint, RPCResponse

from swarmchain.errors import ChainError, ChainUnreachable, ConfigError, SwarmError

PAUSE_MIN_S, PAUSE_MAX_S = 1.0, 60.0
HEADERS = {"Content-Type": "application/json"}
HINT = "start it (`swarmchain devchain` on a laptop), or correct rpc_urls"


@dataclass
class Endpoint:
    """One node: whether it was checked since it last failed, and when it may be asked again.

    `name` is all of the URL that may be shown; `url` has no password, and `headers` has it.
    """

    url: str = field(repr=False)
    name: str
    headers: dict[str, str] = field(repr=False)
    is_checked: bool = False
    failures: int = 0
    retry_at: float = 0.0


class Endpoints(JSONBaseProvider):
    """A web3 provider over several URLs.

    Parameters
    ----------
    urls
        In the order of preference.
    timeout_s
        For one answer of one node.
    clock
        Seconds that only grow.

    Raises
    ------
    ConfigError
        If there is no URL, or one is not HTTP.
    """

    def __init__(self, urls: Sequence[str], *, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.endpoints = [_parse(url) for url in urls or ("",)]
        self.check: Callable[[Callable[[str, list[Any]], Any]], None] | None = None
        self._clock = clock
        # a connection that the node closed is opened again once; whether to repeat a request is decided here
        self._pool = urllib3.PoolManager(timeout=urllib3.Timeout(timeout_s), retries=False)

    @property
    def first(self) -> Endpoint:
        """The node that is asked first now."""
        return self._in_order()[0]

    def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """Ask the nodes in turn.

        Raises
        ------
        ChainUnreachable
            If none answers.
        ChainError
            If nodes answer, but none is one of this chain and contract.
        """
        body = self.encode_rpc_request(method, params)
        problems: list[SwarmError] = []
        for endpoint in self._in_order():
            try:
                self._require_checked(endpoint)
                return self._exchange(endpoint, body)
            except (ChainUnreachable, ChainError) as exc:
                self._pass_over(endpoint)
                problems.append(exc)
        # a node that answers wrongly tells more than one that is silent, and trying again would not mend it
        silent = all(isinstance(problem, ChainUnreachable) for problem in problems)
        raise problems[0] if silent else next(p for p in problems if isinstance(p, ChainError))

    def choose(self, endpoint: Endpoint) -> None:
        """Ask this node first from now on."""
        self.endpoints.remove(endpoint)
        self.endpoints.insert(0, endpoint)

    def ask_one(self, endpoint: Endpoint, method: str, params: list[Any]) -> Any:
        """The result of one question to one node. Raises `ChainUnreachable`, or `ChainError` if it refuses."""
        answer = self._exchange(endpoint, self.encode_rpc_request(RPCEndpoint(method), params))
        if "result" not in answer:
            raise ChainError(f"the node at {endpoint.name} refused {method}: {answer.get('error')}")
        return answer["result"]

    def ask_checked(self, endpoint: Endpoint, method: str, params: list[Any]) -> Any:
        """As `ask_one`, of a node that has shown to be of this chain; raises what the check raises if it has not."""
        self._require_checked(endpoint)
        return self.ask_one(endpoint, method, params)

    def _in_order(self) -> list[Endpoint]:
        """Nodes that may be asked, healthy ones first; all of them if none may."""
        now = self._clock()
        return sorted(self.endpoints, key=lambda e: e.retry_at if e.retry_at > now else 0.0)

    def _require_checked(self, endpoint: Endpoint) -> None:
        if not endpoint.is_checked and self.check is not None:
            self.check(lambda method, params: self.ask_one(endpoint, method, params))
        endpoint.is_checked = True

    def _pass_over(self, endpoint: Endpoint) -> None:
        endpoint.failures += 1
        endpoint.is_checked = False
        endpoint.retry_at = self._clock() + min(PAUSE_MIN_S * 2 ** (endpoint.failures - 1), PAUSE_MAX_S)

    def _exchange(self, endpoint: Endpoint, body: bytes) -> RPCResponse:
        try:
            answer = self._post(endpoint, body)
        except urllib3.exceptions.HTTPError as exc:
            raise ChainUnreachable(f"no Ethereum node answers at {endpoint.name}", hint=HINT) from exc
        if answer.status >= 500 or answer.status in (408, 429):
            raise ChainUnreachable(f"the node at {endpoint.name} answers HTTP {answer.status}", hint="try again later")
        try:
            decoded = self.decode_rpc_response(answer.data)
            if not {"result", "error"} & set(decoded):
                raise ValueError("neither a result nor an error")
        except (ValueError, TypeError) as exc:
            raise ChainError(
                f"the node at {endpoint.name} answered what no Ethereum node would: HTTP {answer.status}, no JSON-RPC",
                hint="is it an Ethereum RPC URL?",
            ) from exc
        endpoint.failures, endpoint.retry_at = 0, 0.0
        return decoded

    def _post(self, endpoint: Endpoint, body: bytes) -> urllib3.BaseHTTPResponse:
        try:
            return self._pool.request("POST", endpoint.url, body=body, headers=endpoint.headers)
        except urllib3.exceptions.ProtocolError:
            # The node closed an idle connection, or went away: a fresh connection tells which.
            return self._pool.request("POST", endpoint.url, body=body, headers=endpoint.headers)


def has_password(url: str) -> bool:
    """Whether a URL names a user, and so probably a password."""
    return "@" in url.partition("://")[2].partition("/")[0]


def _parse(url: str) -> Endpoint:
    scheme = url.partition("://")[0]
    try:
        parts = urlsplit(url)
        is_url = scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        shown = re.sub(r"(?<=[^:/])/.+", "/…", re.sub(r"^([a-z]+://)?.*@", r"\1…@", url))
        raise ConfigError(f"rpc_urls: {shown!r} is no http(s) URL", hint="for example http://127.0.0.1:8545")
    user, _, host = parts.netloc.rpartition("@")
    # not urllib3's own: it takes no umlaut
    headers = {"Authorization": f"Basic {base64.b64encode(unquote(user).encode()).decode()}"} if user else {}
    more = "/…" if parts.path.strip("/") or parts.query else ""
    return Endpoint(parts._replace(netloc=host).geturl(), f"{scheme}://{host}{more}", {**HEADERS, **headers})
