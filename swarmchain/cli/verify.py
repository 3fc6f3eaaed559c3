"""`swarmchain run verify`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmchain.cli.common import ask_password, example, json_option, load, print_json, unlock_seal_key
from swarmchain.config import SiteConfig, read_deployment
from swarmchain.errors import AuditFailed, ConfigError

if TYPE_CHECKING:
    from swarmchain.audit import Audit, RoundAudit
    from swarmchain.chain import SwarmContract
    from swarmchain.protocol import RoundKey
    from swarmchain.store import Store

UNDISCLOSED = "is sealed, and its key was not disclosed"
MARKS = {True: click.style("✓", fg="green"), False: click.style("✗", fg="red")}


@click.command(epilog=example("swarmchain run verify 2 --rpc http://127.0.0.1:8545 --deployment deployment.json",
                              "--store /mnt/swarm --out audit"))
@click.argument("number", type=click.IntRange(min=1))
@click.option("--site", "site_file", type=click.Path(path_type=Path, dir_okay=False),
              help="A site's settings, in place of the next three options; opens what is sealed to that site.")
@click.option("--rpc", "rpc_urls", multiple=True, help="URL of an Ethereum node, best one's own; repeatable.")
@click.option("--deployment", type=click.Path(path_type=Path, dir_okay=False),
              help="deployment.json, as the consortium published it.")
@click.option("--store", "store_url", help="The shared store; to read from is enough.")
@click.option("--keys", "disclosed", type=click.Path(path_type=Path, dir_okay=False),
              help="Of a sealed run: what a site disclosed to the auditor's key.")
@click.option("--auditor-key", type=click.Path(path_type=Path, dir_okay=False),
              help="The auditor's key, as `run auditor-key` made it.")
@click.option("--fast", "is_fast", is_flag=True, help="Check openings and digests, and recompute no merge.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("audit"), show_default=True,
              help="Folder for audit.json and audit.html.")
@json_option
def verify(number: int, site_file: Path | None, rpc_urls: tuple[str, ...], deployment: Path | None,
           store_url: str | None, disclosed: Path | None, auditor_key: Path | None, is_fast: bool, out: Path,
           as_json: bool) -> None:
    """Replay a run from chain and store, without a site's key, and prove or refute every merge.

    Exit code 0 if all is proven, 1 if anything is not; the statistics run that a training run stands on is one more to
    verify.
    """
    from swarmchain.audit import audit_run, read_record
    from swarmchain.page import write_audit
    from swarmchain.store import Store, open_store

    store, config = None, None
    if site_file is not None:
        config = load(site_file)
        rpc_urls = rpc_urls or tuple(config.rpc_urls)
        deployment = deployment or config.resolve(config.chain.deployment)
        store = open_store(config) if store_url is None else None
    if not rpc_urls or deployment is None or (store is None and store_url is None):
        raise ConfigError("where are chain and store?", hint="give --rpc, --deployment and --store, or --site")
    record, store = read_record(_open(rpc_urls, deployment), number), store or Store(str(store_url))
    if disclosed is not None:
        store = _disclose(store, disclosed, auditor_key, record.key_of(number, 0))
    elif record.view.finalized_round and store.has_envelope(record.view.checkpoint):
        store = _open_sealed(store, config)
    say = _print_round if not as_json else (lambda _: None)
    with tempfile.TemporaryDirectory(prefix="swarmchain-verify-") as folder:
        audit = audit_run(record, store, spool_folder=Path(folder), is_fast=is_fast, say=say)
    files = write_audit(out, audit)
    if as_json:
        print_json(audit.to_dict())
    else:
        _print_verdict(audit)
        click.echo(f"wrote {', '.join(map(str, files))}")
    if not audit.is_sound:
        count = len(audit.all_findings)
        hint = "keep store and audit.json as they are; a site that holds the right file can put it back"
        if any(words.endswith(UNDISCLOSED) for words in audit.all_findings):
            hint = ("the run is sealed: make a key with `run auditor-key`, and let a site disclose the run to it with "
                    "`run disclose`")
        raise AuditFailed(f"run {number} is not proven: {audit.all_findings[0]}" + (
            f" (and {count - 1} more)" if count > 1 else ""), hint=hint)


def _open_sealed(store: Store, config: SiteConfig | None) -> Store:
    """A sealed run's store: to the site's own key, or to nobody; then each blob is said to be sealed."""
    from swarmchain.sealed import DisclosedStore, SealedStore

    key = None if config is None else unlock_seal_key(config)
    if key is None:
        return DisclosedStore(store, {})
    # an audit reads: with no members there is no box to put right
    return SealedStore(store, key, context="", members=tuple)


def _disclose(store: Store, disclosed: Path, auditor_key: Path | None, key: RoundKey) -> Store:
    """The store with what was disclosed of it."""
    if auditor_key is None:
        raise ConfigError("--keys is sealed to an auditor's key", hint="name it with --auditor-key")
    from swarmchain.keys import PASSWORD_VARIABLE, open_seal_key
    from swarmchain.sealed import DisclosedStore, open_disclosure

    try:
        data = disclosed.read_bytes()
    except OSError as exc:
        raise ConfigError(f"cannot read {disclosed}: {exc.strerror}", hint="a site writes it with `run disclose`"
                          ) from exc
    opener = open_seal_key(auditor_key, ask_password(auditor_key, os.environ.get(PASSWORD_VARIABLE)))
    return DisclosedStore(store, open_disclosure(data, opener, key).keys)


def _open(rpc_urls: tuple[str, ...], deployment: Path) -> SwarmContract:
    from swarmchain.chain import SwarmContract
    from swarmchain.node import Node

    return SwarmContract(Node(rpc_urls), read_deployment(deployment))


def _print_round(found: RoundAudit) -> None:
    line = f"{MARKS[not found.findings]} round {found.round_id:<4} {found.outcome:<9} "
    if found.outcome == "finalized":
        done = "merge recomputed" if found.is_recomputed else "digests checked"
        line += (f"{len(found.included)} of {len(found.members)} counted, {len(found.accepting)} accepted "
                 f"(needed {found.quorum}), {done}, {found.checkpoint[:12]}…")
    else:
        line += f"{len(found.committed)} of {len(found.members)} committed"
    click.echo(line)
    for words in found.findings:
        click.echo(f"    ✗ {words}")
    for words in found.remarks:
        click.echo(f"    · {words}")


def _print_verdict(audit: Audit) -> None:
    for words in audit.findings:
        click.echo(f"{MARKS[False]} {words}")
    for words in audit.remarks:
        click.echo(f"  · {words}")
    finalized = sum(r.outcome == "finalized" for r in audit.rounds)
    how = "digests checked" if audit.is_fast else "merges recomputed bit for bit"
    end = f"{how}; head {audit.head[:12]}…" if audit.is_sound else f"findings {len(audit.all_findings)}"
    click.echo(f"{MARKS[audit.is_sound]} run {audit.run} “{audit.name}”: rounds {len(audit.rounds)}, "
               f"finalized {finalized}, {end}")
