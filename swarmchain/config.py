"""A site's own settings: site.toml, never shared.

Relative paths are relative to the file. Precedence, highest first: a command's option, the environment
(`SWARMCHAIN_PASSWORD`, `SWARMCHAIN_RPC_URL`, `SWARMCHAIN_METRICS`), site.toml, the defaults. Unknown keys are errors,
so that a typing error is no silent default.
"""

from __future__ import annotations

import contextlib
import json
import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from swarmchain.errors import ConfigError
from swarmchain.profiles import ProfileName
from swarmchain.protocol import Strict, first_problem

M = TypeVar("M", bound=BaseModel)


class ChainConfig(Strict):
    """Where the contract is."""

    rpc_urls: Annotated[tuple[str, ...], Field(min_length=1, max_length=16)]
    deployment: str
    profile: ProfileName = "auto"
    timeout_s: Annotated[float, Field(gt=0)] = 10.0


class StoreConfig(Strict):
    """Where blobs are shared: a folder or any fsspec URL."""

    url: str


class KeysConfig(Strict):
    """The site's key; the password comes from `SWARMCHAIN_PASSWORD`, this file, or a prompt."""

    keystore: str
    password_file: str | None = None


class DataConfig(Strict):
    """The site's cells. `label_map` renames this site's labels to the run's; "" leaves those cells out."""

    path: str
    label_column: str
    layer: str | None = None
    state: Literal["auto", "counts", "log1p", "arcsinh", "none"] = "auto"
    label_map: dict[str, str] = {}


class AgentConfig(Strict):
    """How this site's agent behaves; all durations in seconds."""

    work_dir: str = "work"
    poll_s: Annotated[float, Field(gt=0)] = 0.5
    stagger_s: Annotated[float, Field(gt=0)] = 2.0
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    resume_s: Annotated[float, Field(gt=0)] = 30.0
    metrics: str | None = None


class SiteConfig(Strict):
    """site.toml, as written by `swarmchain site init`."""

    name: Annotated[str, Field(min_length=1, max_length=32)]
    chain: ChainConfig
    store: StoreConfig
    keys: KeysConfig
    data: DataConfig | None = None
    agent: AgentConfig = AgentConfig()
    folder: Path = Path()  # where site.toml lies; not a key of the file

    def resolve(self, path: str) -> Path:
        """`path` relative to the folder of site.toml."""
        return Path(os.path.normpath(self.folder / Path(path).expanduser()))

    @property
    def store_url(self) -> str:
        """The store as a URL, or as an absolute path where it is a folder."""
        return self.store.url if "://" in self.store.url else str(self.resolve(self.store.url))

    @property
    def rpc_urls(self) -> tuple[str, ...]:
        """The nodes to talk to, in the order of preference; `SWARMCHAIN_RPC_URL` wins over the file."""
        named = os.environ.get("SWARMCHAIN_RPC_URL")
        return (named,) if named else self.chain.rpc_urls

    @property
    def work_dir(self) -> Path:
        """Where the agent keeps its journal and its own contributions."""
        return self.resolve(self.agent.work_dir)


class Deployment(Strict):
    """deployments/<chain id>.json: where a consortium's contract lies. Public."""

    format: Literal["swarmchain-deployment/1"] = "swarmchain-deployment/1"
    chain_id: int
    contract: Annotated[str, Field(pattern=r"^0x[0-9a-fA-F]{40}$")]
    block: int
    code_sha256: str
    sites: dict[str, str]


class SiteCard(Strict):
    """What a site tells the others before a consortium exists: no counts, no cells, only names."""

    format: Literal["swarmchain-site-card/1"] = "swarmchain-site-card/1"
    name: Annotated[str, Field(min_length=1, max_length=32)]
    address: Annotated[str, Field(pattern=r"^0x[0-9a-fA-F]{40}$")]
    features: tuple[str, ...]
    labels: tuple[str, ...]


def read_site_config(path: Path) -> SiteConfig:
    """Read site.toml.

    Raises
    ------
    ConfigError
        If the file is missing, no TOML, or has an unknown key or a wrong type; the message names the key.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}", hint="`swarmchain site init` writes one") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not TOML: {exc}", hint="compare with deploy/site.toml") from exc
    if "folder" in data:
        raise ConfigError(f"{path}: folder: unknown key", hint="remove it")
    try:
        # JSON mode, so that TOML's arrays may stand where tuples are meant
        config = SiteConfig.model_validate_json(json.dumps(data, default=str))
    except ValidationError as exc:
        raise ConfigError(f"{path}: {first_problem(exc)}", hint="compare with deploy/site.toml") from exc
    if len(config.name.encode()) > 32:
        raise ConfigError(f"{path}: name: longer than 32 bytes in UTF-8", hint="shorten it")
    return config.model_copy(update={"folder": path.resolve().parent})


def require_paths(config: SiteConfig) -> None:
    """See that every file and folder that the settings name is there, before any work.

    Raises
    ------
    ConfigError
        Naming the first key whose path does not exist.
    """
    named = {"chain.deployment": config.chain.deployment, "keys.keystore": config.keys.keystore}
    if config.keys.password_file is not None and "SWARMCHAIN_PASSWORD" not in os.environ:
        named["keys.password_file"] = config.keys.password_file
    if config.data is not None:
        named["data.path"] = config.data.path
    if "://" not in config.store.url:
        named["store.url"] = config.store.url
    for key, path in named.items():
        if not config.resolve(path).exists():
            raise ConfigError(
                f"site.toml: {key}: {config.resolve(path)} does not exist",
                hint=f"relative paths start at {config.folder}",
            )


def read_model(path: Path, model: type[M], *, what: str, hint: str) -> M:
    """Read one of the JSON files that swarmchain writes.

    Raises
    ------
    ConfigError
        If the file is missing or is not exactly such a document.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as exc:
        raise ConfigError(f"cannot read {what} {path}: {exc.strerror}", hint=hint) from exc
    except ValidationError as exc:
        raise ConfigError(f"{path} is no {what}: {first_problem(exc)}", hint=hint) from exc


def read_deployment(path: Path) -> Deployment:
    """Read deployments/<chain id>.json; see `read_model` for what is raised."""
    return read_model(path, Deployment, what="deployment", hint="`swarmchain deploy` writes it")


def read_site_card(path: Path) -> SiteCard:
    """Read a site card; see `read_model` for what is raised."""
    return read_model(path, SiteCard, what="site card", hint="`swarmchain site init` writes it")


def write_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a small file whole or not at all.

    Raises
    ------
    ConfigError
        If the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"cannot write {path}: {exc.strerror}", hint="check permissions and free space") from exc


SITE_TOML = """\
# A site's own settings. Nothing in this file is shared. Relative paths are relative to this file.

# as the other sites know it, at most 32 bytes
name = {name}

[chain]
# Ethereum nodes of the consortium's chain; the first that is healthy is asked
# (SWARMCHAIN_RPC_URL in the environment wins)
rpc_urls = [{rpc_url}]
# written by `swarmchain deploy`; ask the site that deployed
deployment = {deployment}
# "anvil", "hardhat", "besu-qbft", or "auto" (told from what the node calls itself)
profile = "auto"
# how long to wait for one answer of a node, in seconds
timeout_s = 10.0

[store]
# a folder that all sites see, or an fsspec URL such as s3://bucket/prefix
url = {store}

[keys]
# encrypted; who has it and its password signs for the site
keystore = {keystore}
# else SWARMCHAIN_PASSWORD in the environment, or a prompt
{password_line}

{data_section}[agent]
# journal and own contributions
work_dir = "work"
# longest pause between two looks at the chain, in seconds
poll_s = {poll_s}
# how long the next site waits before it opens a round in another's place, in seconds
stagger_s = {stagger_s}
# CPU threads for training; keep it fixed, results depend on it
threads = 1
# how often a long local training is written down, to go on from there after a restart, in seconds
resume_s = 30.0
# where /healthz and Prometheus' /metrics are answered (SWARMCHAIN_METRICS in the environment wins); off without it
# metrics = "127.0.0.1:9464"
"""


DATA_TOML = """\
# leave this section out where only rehearsals run
[data]
# an AnnData file (.h5ad); it never leaves the site
path = {data}
# the column of .obs that holds the cell type
label_column = {label_column}
# what X holds: "counts", "log1p", "arcsinh", "none" (as it is), or "auto" (told from the numbers)
state = "auto"
# use this layer in place of X
# layer = "counts"

# this site's label = the run's label; "" leaves those cells out
[data.label_map]
{label_map}
"""


def render_site_toml(
    *,
    name: str,
    rpc_url: str,
    deployment: str,
    store: str,
    data: str | None = None,
    label_column: str = "",
    keystore: str = "keystore.json",
    password_file: str | None = None,
    label_map: dict[str, str] | None = None,
    poll_s: float = 0.5,
    stagger_s: float = 2.0,
) -> str:
    """Text of an annotated site.toml, without [data] where none are named. JSON strings are valid TOML strings."""
    quote = json.dumps
    password = f"password_file = {quote(password_file)}" if password_file else (
        '# password_file = "password.txt"'
    )
    lines = "".join(f"{quote(k)} = {quote(v)}\n" for k, v in (label_map or {}).items())
    section = "" if data is None else DATA_TOML.format(
        data=quote(data), label_column=quote(label_column), label_map=lines)
    return SITE_TOML.format(
        name=quote(name), rpc_url=quote(rpc_url), deployment=quote(deployment), store=quote(store),
        keystore=quote(keystore), password_line=password, data_section=section, poll_s=poll_s, stagger_s=stagger_s,
    )
