"""What would go wrong tonight, said now: a site's settings, key, chain, store, machine and data, one finding each.

Looks only: nothing is signed or sent, and of all that is touched only a probe in the store is written, and removed.
No finding shows a secret. A check that stands on one that failed is passed over, and says so.
"""

from __future__ import annotations

import os
import platform
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

from swarmchain import __version__
from swarmchain.chain import SwarmContract
from swarmchain.config import SiteConfig, read_deployment, read_site_config
from swarmchain.describe import describe_duration
from swarmchain.duties import is_over
from swarmchain.errors import ChainUnreachable, SwarmError, Unreachable
from swarmchain.fitness import Desk, Finding, describe_size, examine_run, find_free_disk
from swarmchain.journal import Journal
from swarmchain.keys import PASSWORD_VARIABLE, SealKey, Signer, read_address
from swarmchain.node import Node
from swarmchain.profiles import choose_profile
from swarmchain.protocol import Change
from swarmchain.rpc import has_password
from swarmchain.sealed import SealedStore
from swarmchain.site import open_contract
from swarmchain.store import Store, open_store, read_spec

SKEW_MAX_S = 30.0
DISK_MIN = 1 << 30
STORE_SLOW_S = 5.0
PACKAGES = ("numpy", "torch", "anndata", "web3", "fsspec")


@dataclass
class Visit:
    """What the checks so far have opened; `done` names those that went well."""

    site_file: Path
    unlock: Callable[[SiteConfig], Signer]
    now: Callable[[], float]
    run: int | None
    unlock_seal: Callable[[SiteConfig], SealKey | None]
    seal_key: SealKey | None = None
    config: SiteConfig = field(init=False)
    contract: SwarmContract = field(init=False)
    store: Store = field(init=False)
    site: int = -1
    done: set[str] = field(default_factory=set)


def examine_site(site_file: Path, *, unlock: Callable[[SiteConfig], Signer], run: int | None = None,
                 unlock_seal: Callable[[SiteConfig], SealKey | None] = lambda config: None,
                 now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Every check in its order, each as soon as it is known.

    Parameters
    ----------
    unlock
        Opens the keystore; may ask for the password. `unlock_seal` opens the seal key, if the site has one.
    run
        The run that the site is examined for; by default all that it has joined and that are not over.
    now
        Seconds since 1970 by this machine.
    """
    visit = Visit(site_file, unlock, now, run, unlock_seal)
    for name, check, needs in CHECKS:
        if missing := [need for need in needs if need not in visit.done]:
            yield Finding(name, "skipped", f"not looked at: {missing[0]} comes first")
            continue
        is_well = True
        try:
            for found in check(visit):
                is_well &= found.status != "failed"
                yield found
        except SwarmError as exc:
            is_well = False
            yield fail(name, exc)
        if is_well:
            visit.done.add(name)


def compute_exit_code(findings: list[Finding]) -> int:
    """1 if anything has to be mended, 3 if all that failed is a chain or store that does not answer, else 0."""
    failed = [found for found in findings if found.status == "failed"]
    if not failed:
        return 0
    return 3 if all(found.is_unreachable for found in failed) else 1


def fail(check: str, exc: SwarmError) -> Finding:
    """An error as a finding."""
    return Finding(check, "failed", exc.message, exc.hint, isinstance(exc, Unreachable))


# -- the site's own files


def check_settings(visit: Visit) -> Iterator[Finding]:
    """site.toml parses, and is nobody else's to read where it holds a password."""
    visit.config = read_site_config(visit.site_file)
    if any(has_password(url) for url in visit.config.chain.rpc_urls):
        found = _require_private(visit.site_file, "settings")
        if found.status != "ok":
            yield replace(found, status="warning", words=f"rpc_urls holds a password, and {found.words}")
    yield Finding("settings", "ok", f"{visit.site_file} of {visit.config.name}")


def check_key(visit: Visit) -> Iterator[Finding]:
    """The keystore opens with the password, and is nobody else's to read."""
    signer = visit.unlock(visit.config)
    yield Finding("key", "ok", f"opens; signs as {signer.address}")


def check_seal_key(visit: Visit) -> Iterator[Finding]:
    """The seal key opens with the same password, and is nobody else's to read."""
    named = visit.config.keys.seal_key
    if named is None:
        yield Finding("seal key", "ok", "none: what this site writes lies in the clear, sealed runs are closed to it")
        return
    visit.seal_key = visit.unlock_seal(visit.config)
    yield _require_private(visit.config.resolve(named), "seal key")


def check_password(visit: Visit) -> Iterator[Finding]:
    """Where the password comes from, and who can read it."""
    named = visit.config.keys.password_file
    if PASSWORD_VARIABLE in os.environ:
        yield Finding("password", "ok", f"from {PASSWORD_VARIABLE}")
    elif named is None:
        yield Finding("password", "warning", "from a prompt: an agent cannot start by itself",
                      "set [keys] password_file, or run the agent under systemd with LoadCredential")
    else:
        yield _require_private(visit.config.resolve(named), "password")


def check_journal(visit: Visit) -> Iterator[Finding]:
    """The journal is this site's, of this version, and nobody else's to read."""
    config, contract = visit.config, visit.contract
    path = config.work_dir / "journal.sqlite"
    if not path.exists():
        yield Finding("journal", "ok", f"none yet; the agent starts one at {path}")
        return
    found = _require_private(path, "journal")
    if found.status == "ok":
        Journal(config.work_dir, chain_id=contract.chain_id, contract=contract.address, site=visit.site).close()
    yield found


def _require_private(path: Path, check: str) -> Finding:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as exc:
        return Finding(check, "failed", f"cannot read {path}: {exc.strerror}", "correct the path in site.toml")
    if os.name == "posix" and mode & 0o077:
        return Finding(check, "failed", f"{path} is readable by others (mode {mode:o})", f"chmod 600 {path}")
    return Finding(check, "ok", f"{path}, readable by its owner only")


# -- the chain


def check_deployment(visit: Visit) -> Iterator[Finding]:
    """The deployment file parses."""
    found = read_deployment(visit.config.resolve(visit.config.chain.deployment))
    yield Finding("deployment", "ok", f"contract {found.contract} on chain {found.chain_id}")


def check_nodes(visit: Visit) -> Iterator[Finding]:
    """Each node answers, and how quickly."""
    problems: list[SwarmError] = []
    urls = visit.config.rpc_urls
    for url in urls:
        started = time.monotonic()
        try:
            node = Node(url, timeout_s=visit.config.chain.timeout_s)
            head, took = node.read_head(), time.monotonic() - started
            yield Finding("nodes", "ok", f"{node.rpc_url}: {node.client_version}, chain {node.chain_id}, block {head}, "
                                         f"{1000 * took:.0f} ms")
        except SwarmError as exc:
            problems.append(exc)
            if len(urls) > 1:
                yield Finding("nodes", "warning", exc.message, "the other nodes are asked meanwhile")
    if len(problems) == len(urls):
        raise next((p for p in problems if not isinstance(p, ChainUnreachable)), problems[0])


def check_contract(visit: Visit) -> Iterator[Finding]:
    """Chain id and code at the address are the deployment's."""
    visit.contract = open_contract(visit.config)
    yield Finding("contract", "ok", f"this version's code lies at {visit.contract.address}")


def check_profile(visit: Visit) -> Iterator[Finding]:
    """The agent's rules fit what the node calls itself."""
    node = visit.contract.node
    fitting, client = choose_profile("auto", node.client_version), node.client_version
    if fitting.name != node.profile.name:
        yield Finding("profile", "warning", f"{node.profile.name}, but the node is {client}",
                      '[chain] profile = "auto" chooses by what the node calls itself')
    else:
        yield Finding("profile", "ok", f"{node.profile.name} for {client}")


def check_clock(visit: Visit) -> Iterator[Finding]:
    """Time here against the chain's."""
    node = visit.contract.node
    ahead = visit.now() - node.read_time()
    oldest = node.profile.head_age_max_s
    if oldest is not None and ahead > oldest:
        yield Finding("clock", "failed", f"the newest block is {describe_duration(ahead)} old",
                      "the chain stands still (ask its validators), or set this machine's clock by NTP")
    elif abs(ahead) > SKEW_MAX_S:
        side = "behind" if ahead < 0 else "ahead of"
        yield Finding("clock", "warning", f"this machine is {describe_duration(abs(ahead))} {side} the chain; "
                                          "deadlines are the chain's", "set it by NTP")
    else:
        yield Finding("clock", "ok", f"within {abs(ahead):.0f} s of the chain's time")


def check_membership(visit: Visit) -> Iterator[Finding]:
    """The contract knows this key, and nobody is about to change that."""
    config, contract = visit.config, visit.contract
    address = read_address(config.resolve(config.keys.keystore))
    if successor := contract.get_successor():
        yield Finding("membership", "failed", f"the consortium has moved to the contract {successor}",
                      "use the deployment file of the new contract")
        return
    visit.site = contract.get_site_index(address)
    record = contract.get_sites()[visit.site]
    if record.name != config.name:
        yield Finding("membership", "warning", f"the contract knows this key as {record.name!r}, "
                                               f"site.toml says {config.name!r}", "correct `name` in site.toml")
    else:
        yield Finding("membership", "ok", f"site {visit.site}, active")
    now = contract.node.read_time()
    for change in contract.get_proposals():
        is_ours = change.subject == address or change.kind is Change.RETIRE
        if is_ours and not change.executed and change.deadline > now and change.kind is not Change.ADMIT:
            yield Finding("membership", "warning", f"proposal {change.proposal} is open: {_describe(change.kind)}",
                          "`swarmchain consortium list` shows who approved it")


def _describe(kind: Change) -> str:
    return {Change.REMOVE: "remove this site", Change.ROTATE_KEY: "let this site sign with another key",
            Change.RETIRE: "retire this contract", Change.ADMIT: "admit a site"}[kind]


# -- store and machine


def check_store(visit: Visit) -> Iterator[Finding]:
    """A probe is written, read back and removed."""
    visit.store = open_store(visit.config)
    started = time.monotonic()
    visit.store.require_writable()
    took = time.monotonic() - started
    if took > STORE_SLOW_S:
        yield Finding("store", "warning", f"a probe took {took:.1f} s to write, read and remove",
                      "every round waits for the store: look at the network between")
    else:
        yield Finding("store", "ok", f"a probe was written, read back and removed in {1000 * took:.0f} ms")


def check_disk(visit: Visit) -> Iterator[Finding]:
    """Room where journal and contributions go."""
    free = find_free_disk(visit.config.work_dir)
    if free < DISK_MIN:
        yield Finding("disk", "failed", f"{describe_size(free)} free at {visit.config.work_dir}",
                      f"free space: {describe_size(DISK_MIN)} at least, or name another [agent] work_dir")
    else:
        yield Finding("disk", "ok", f"{describe_size(free)} free at {visit.config.work_dir}")


def check_versions(visit: Visit) -> Iterator[Finding]:
    """What to compare with the other sites."""
    found = [f"{name} {metadata.version(name)}" for name in PACKAGES]
    yield Finding("versions", "ok", ", ".join([f"swarmchain {__version__}", f"Python {platform.python_version()}",
                                               *found]))


# -- data and runs


def check_data(visit: Visit) -> Iterator[Finding]:
    """The site's file opens, and has the label column."""
    data = visit.config.data
    if data is None:
        yield Finding("data", "warning", "site.toml has no [data]: only rehearsals can be joined",
                      "name the site's AnnData file there")
        return
    from swarmchain.data import read_names  # takes AnnData

    features, labels = read_names(visit.config.resolve(data.path), data.label_column)
    unknown = sorted(set(data.label_map) - set(labels))
    if unknown:
        yield Finding("data", "warning", f"[data.label_map] renames {unknown[0]!r}, which no cell has",
                      f"the labels are: {', '.join(labels[:12])}")
    else:
        yield Finding("data", "ok", f"{len(features)} features, {len(labels)} labels")


def check_runs(visit: Visit) -> Iterator[Finding]:
    """Data, memory, disk and time against the law of each run that matters."""
    contract = visit.contract
    numbers = [visit.run] if visit.run is not None else range(1, contract.get_run_count() + 1)
    # to no members: the doctor reads what is sealed to the site, and puts no box right
    key, store = visit.seal_key, visit.store
    store = store if key is None else SealedStore(store, key, context="", members=tuple)
    seen = 0
    for number in numbers:
        view = contract.view_run(number)
        if visit.run is None and visit.site not in view.joined:
            continue
        name = f"run {number}"
        try:
            spec = read_spec(visit.store, view.spec)
            if visit.run is None and is_over(view, spec.limits):
                continue
            seen += 1
            yield from examine_run(Desk(visit.config, visit.site, store, contract.view_run), view, spec)
        except SwarmError as exc:
            yield fail(name, exc)
    if not seen:
        yield Finding("runs", "ok", "none under way with this site; `--run N` examines one before joining")


Check = Callable[[Visit], Iterator[Finding]]
CHECKS: tuple[tuple[str, Check, tuple[str, ...]], ...] = (
    ("settings", check_settings, ()),
    ("password", check_password, ("settings",)),
    ("key", check_key, ("settings",)),
    ("seal key", check_seal_key, ("settings",)),
    ("deployment", check_deployment, ("settings",)),
    ("nodes", check_nodes, ("settings",)),
    ("contract", check_contract, ("deployment", "nodes")),
    ("profile", check_profile, ("contract",)),
    ("clock", check_clock, ("contract",)),
    ("membership", check_membership, ("contract",)),
    ("journal", check_journal, ("membership",)),
    ("disk", check_disk, ("settings",)),
    ("store", check_store, ("settings",)),
    ("data", check_data, ("settings",)),
    ("versions", check_versions, ()),
    ("runs", check_runs, ("membership", "store")),
)
