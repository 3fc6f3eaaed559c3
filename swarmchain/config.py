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
# credentials and endpoint, never in this file: a TOML file of mode 600, or a profile of the AWS files, or
# AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL in the environment; see docs/store.md
# options_file = "store.toml"
# profile = "swarm"
# rounds of each run that `swarmchain store prune` leaves; without it everything stays
# keep_rounds = 20

[keys]
# encrypted; who has it and its password signs for the site
keystore = {keystore}
# under the same password: opens what is sealed to the site, and seals its contributions; without it nothing is sealed
{seal_line}
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
# .h5ad, .zarr, .fcs or a folder of them, a 10x folder or .h5, a .csv or .tsv table; it never leaves the site
path = {data}
# the column of .obs (or of `labels`) that holds the cell type, or the label of its donor
label_column = {label_column}
# for runs on donors: the column that says whose a cell is (of FCS files each is a donor where none is named), and the
# one that tells a donor's samples apart
{donor_line}
{sample_line}
# a table of labels where the file has none; its first column (or labels_key) names the cell, or the FCS file
{labels_line}
# what X holds: "counts", "log1p", "arcsinh", "intensities" (cytometry as measured), "proportions", "none" (as it is),
# or "auto" (told from the numbers)
state = {state}
# use this layer in place of X; "raw" is .raw
# layer = "counts"
# the feature that holds a row's total, where proportions are made of counts
# total_column = "total"
# FCS: apply $SPILLOVER: true (it must be there), false, or "auto" (where it is there)
# compensate = "auto"
# take names of features from this column of .var in place of .var_names
# feature_column = "gene_ids"
# translate them to "symbol" or "ensembl"; "auto" takes the run's kind
# features = "auto"
# by this table with the columns ensembl, symbol
# feature_table = "genes.csv"
# a table label, shared (the run's label), ontology (its Cell Ontology id, may be empty)
# label_file = "labels-map.csv"
# labels that are not on the run's list: "refuse", or "exclude" those cells
# unmapped = "refuse"
# fewest kinds of cells that a run may find here
{classes_line}

# keep the cells whose columns hold these values
# [data.where]
# "sample" = "S01"

# this site's feature = the run's feature
# [data.aliases]
# "CD3e" = "CD3"

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
    labels: str | None = None,
    donor_column: str | None = None,
    sample_column: str | None = None,
    classes_min: int = 2,
    keystore: str = "keystore.json",
    seal_key: str | None = None,
    password_file: str | None = None,
    label_map: dict[str, str] | None = None,
    state: str = "auto",
    poll_s: float = 0.5,
    stagger_s: float = 2.0,
) -> str:
    """Text of an annotated site.toml, without [data] where none are named. JSON strings are valid TOML strings."""
    quote = json.dumps
    password = f"password_file = {quote(password_file)}" if password_file else (
        '# password_file = "password.txt"'
    )
    seal = f"seal_key = {quote(seal_key)}" if seal_key else '# seal_key = "seal-key.json"'
    lines = "".join(f"{quote(k)} = {quote(v)}\n" for k, v in (label_map or {}).items())
    section = "" if data is None else DATA_TOML.format(
        data=quote(data), label_column=quote(label_column), state=quote(state), label_map=lines,
        labels_line=f"labels = {quote(labels)}" if labels else '# labels = "labels.csv"',
        donor_line=f"donor_column = {quote(donor_column)}" if donor_column else '# donor_column = "donor"',
        sample_line=f"sample_column = {quote(sample_column)}" if sample_column else '# sample_column = "sample"',
        classes_line="# classes_min = 2" if classes_min == 2 else f"classes_min = {classes_min}")
    return SITE_TOML.format(
        name=quote(name), rpc_url=quote(rpc_url), deployment=quote(deployment), store=quote(store),
        keystore=quote(keystore), password_line=password, seal_line=seal, data_section=section, poll_s=poll_s,
        stagger_s=stagger_s,
    )
