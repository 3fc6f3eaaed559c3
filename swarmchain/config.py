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

DATA_PATHS = ("path", "labels", "label_file", "feature_table")


class ChainConfig(Strict):
    """Where the contract is."""

    rpc_urls: Annotated[tuple[str, ...], Field(min_length=1, max_length=16)]
    deployment: str
    profile: ProfileName = "auto"
    timeout_s: Annotated[float, Field(gt=0)] = 10.0


class StoreConfig(Strict):
    """Where blobs are shared: a folder or any fsspec URL.

    `options_file` is a TOML file with credentials and endpoint, readable by its owner only; `profile` names one of
    the standard AWS files' profiles. `keep_rounds` is what `store prune` leaves of each run; None for everything.
    """

    url: str
    profile: str | None = None
    options_file: str | None = None
    keep_rounds: Annotated[int, Field(ge=1, le=100_000)] | None = None


class KeysConfig(Strict):
    """The site's keys; their password comes from `SWARMCHAIN_PASSWORD`, this file, or a prompt.

    Without a `seal_key` contributions and checkpoints are not sealed.
    """

    keystore: str
    seal_key: str | None = None
    password_file: str | None = None


class DataConfig(Strict):
    """The site's cells: where they are, what their values, features and labels are called, and by whom they came.

    `label_map` renames this site's labels to the run's ("" leaves those cells out); `label_file` does so from a table.
    `labels` is a table beside the cells where the file itself has no columns (its column `labels_key`, or else the
    first, names the cells); `where` keeps the cells whose columns hold these values. `donor_column` and `sample_column`
    say whose a cell is, for runs that split by donor. `total_column` is the feature that holds a row's total, for
    proportions.
    """

    path: str
    label_column: str
    donor_column: str | None = None
    sample_column: str | None = None
    labels: str | None = None
    labels_key: str | None = None
    where: dict[str, str] = {}
    layer: str | None = None
    state: Literal["auto", "counts", "log1p", "arcsinh", "intensities", "proportions", "none"] = "auto"
    total_column: str | None = None
    compensate: bool | Literal["auto"] = "auto"
    features: Literal["auto", "symbol", "ensembl"] = "auto"
    feature_column: str | None = None
    feature_table: str | None = None
    aliases: dict[str, str] = {}
    label_file: str | None = None
    label_map: dict[str, str] = {}
    unmapped: Literal["refuse", "exclude"] = "refuse"
    classes_min: Annotated[int, Field(ge=1)] = 2


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
    def cells(self) -> DataConfig | None:
        """[data], with paths that do not depend on the folder of site.toml."""
        if self.data is None:
            return None
        named = {key: getattr(self.data, key) for key in DATA_PATHS}
        return self.data.model_copy(update={k: str(self.resolve(v)) for k, v in named.items() if v is not None})

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
    if config.keys.seal_key is not None:
        named["keys.seal_key"] = config.keys.seal_key
    if config.data is not None:
        paths = {key: getattr(config.data, key) for key in DATA_PATHS}
        named.update({f"data.{key}": path for key, path in paths.items() if path is not None})
    if "://" not in config.store.url:
        named["store.url"] = config.store.url
    if config.store.options_file is not None:
        named["store.options_file"] = config.store.options_file
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
