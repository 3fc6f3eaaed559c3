"""`swarmchain consortium`: who the sites are, and how a majority of them changes that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swarmchain.cli.common import connect, example, json_option, load, print_json, site_option, unlock
from swarmchain.config import read_deployment, read_site_card
from swarmchain.errors import ConfigError, ProposalExecuted
from swarmchain.protocol import Change

if TYPE_CHECKING:
    from swarmchain.chain import ChangeProposal, SiteRecord, SwarmContract

ADDRESS_DIGITS = 40


@click.group()
def consortium() -> None:
    """Admit and remove sites, rotate keys, retire: proposed by one site, carried out by a majority."""


@consortium.group()
def propose() -> None:
    """Propose a change; the proposer approves it by proposing."""


def change_options(command: Callable[..., None]) -> Callable[..., None]:
    """What every proposal takes."""
    return site_option(json_option(command))


@propose.command(epilog=example("swarmchain consortium propose admit west/site-card.json --site north/site.toml"))
@click.argument("card", type=click.Path(path_type=Path, dir_okay=False))
@change_options
def admit(card: Path, site_file: Path, as_json: bool) -> None:
    """Admit the site of this card. Compare its address with the site itself, over another channel."""
    from swarmchain.chain import encode_name

    found = read_site_card(card)
    _propose(site_file, as_json, Change.ADMIT, lambda _: (found.address, encode_name(found.name).hex()))


@propose.command(epilog=example("swarmchain consortium propose remove West --site north/site.toml"))
@click.argument("name")
@change_options
def remove(name: str, site_file: Path, as_json: bool) -> None:
    """Remove a site, by name or address. It falls silent at once; rounds that are open keep it in their count."""
    _propose(site_file, as_json, Change.REMOVE, lambda contract: (_find_site(contract, name).address, ""))


@propose.command(epilog=example(
    "swarmchain consortium propose rotate East 0x90F79bf6EB2c4f870365E785982E1f101E93b906 --site north/site.toml"))
@click.argument("name")
@click.argument("new_address")
@change_options
def rotate(name: str, new_address: str, site_file: Path, as_json: bool) -> None:
    """Let a site, by name or address, sign with another key: after a loss, or as a habit."""
    key = _require_address(new_address).removeprefix("0x").lower()
    _propose(site_file, as_json, Change.ROTATE_KEY, lambda contract: (_find_site(contract, name).address, key))


@propose.command(epilog=example("swarmchain consortium propose retire new-deployment.json --site north/site.toml"))
@click.argument("deployment", type=click.Path(path_type=Path, dir_okay=False))
@change_options
def retire(deployment: Path, site_file: Path, as_json: bool) -> None:
    """Move on to the contract of this deployment file. Rounds that are open end; no other begins here."""
    successor = read_deployment(deployment).contract
    _propose(site_file, as_json, Change.RETIRE, lambda _: (successor, ""))


@consortium.command(epilog=example("swarmchain consortium approve 1 --site east/site.toml"))
@click.argument("number", type=click.IntRange(min=1))
@site_option
@json_option
def approve(number: int, site_file: Path, as_json: bool) -> None:
    """Approve a proposed change, as `consortium list` shows it. The approval that makes a majority carries it out."""
    from swarmchain.site import open_site

    config = load(site_file)
    with open_site(config, unlock(config)) as site:
        found = _find_proposal(site.contract, number)
        told = "approved"
        if found is not None and (found.executed or site.index in found.approvals):
            told = "was carried out already" if found.executed else "was approved by this site already"
        else:
            try:
                site.contract.approve_change(site.signer, number)
            except ProposalExecuted:
                told = "was carried out already"
        _tell(site.contract, number, told, as_json=as_json)


@consortium.command("list", epilog=example("swarmchain consortium list --site north/site.toml"))
@site_option
@json_option
def list_sites(site_file: Path, as_json: bool) -> None:
    """The sites, and the changes that are proposed: who approved, how many are needed, until when. Needs no key."""
    contract = connect(load(site_file))
    sites, now = contract.get_sites(), contract.node.read_time()
    rows = [_describe(found, sites, now=now) for found in contract.get_proposals()]
    successor = contract.get_successor()
    if as_json:
        members = [{"site": s.site, "name": s.name, "address": s.address, "active": s.active} for s in sites]
        print_json({"contract": contract.address, "chain_id": contract.chain_id, "successor": successor or None,
                    "sites": members, "proposals": rows})
        return
    moved = f"; moved to {successor}" if successor else ""
    click.echo(f"contract {contract.address} on chain {contract.chain_id}, "
               f"{sum(s.active for s in sites)} active sites{moved}")
    for record in sites:
        click.echo(f"  {record.site:>3}  {record.name:<32}  {record.address}{'' if record.active else '  not active'}")
    for row in rows:
        click.echo(f"proposal {row['proposal']}: {row['words']}; {row['state_words']}")


def _propose(site_file: Path, as_json: bool, kind: Change, find: Callable[[SwarmContract], tuple[str, str]]) -> None:
    """Propose, unless the same is proposed already: then say so, and approve nothing."""
    from swarmchain.site import open_site

    config = load(site_file)
    with open_site(config, unlock(config)) as site:
        contract = site.contract
        subject, data = find(contract)
        same = _find_pending(contract, kind, subject, data)
        number = same.proposal if same else contract.propose_change(site.signer, kind, subject=subject, data=data)
        _tell(contract, number, "is proposed already" if same else "proposed", as_json=as_json)


def _find_pending(contract: SwarmContract, kind: Change, subject: str, data: str) -> ChangeProposal | None:
    now, about = contract.node.read_time(), (kind, subject.lower(), data.rjust(64, "0"))
    return next((p for p in contract.get_proposals() if not p.executed and p.deadline > now
                 and (p.kind, p.subject.lower(), p.data) == about), None)


def _find_proposal(contract: SwarmContract, number: int) -> ChangeProposal | None:
    return next((p for p in contract.get_proposals() if p.proposal == number), None)


def _tell(contract: SwarmContract, number: int, told: str, *, as_json: bool) -> None:
    found = _find_proposal(contract, number)
    assert found is not None
    row = _describe(found, contract.get_sites(), now=contract.node.read_time())
    if as_json:
        print_json({**row, "told": told})
    else:
        click.echo(f"proposal {number} {told}: {row['words']}; {row['state_words']}")


def _describe(found: ChangeProposal, sites: list[SiteRecord], *, now: int) -> dict[str, Any]:
    """One proposal for tools and for people."""
    from swarmchain.describe import describe_duration

    active = {s.site for s in sites if s.active}
    names = {s.site: s.name for s in sites}
    approvals = [names[i] for i in sorted(found.approvals & active)]
    needed = len(active) // 2 + 1
    state = "done" if found.executed else "open" if found.deadline > now else "expired"
    left = describe_duration(found.deadline - now)
    words = {"done": "carried out", "expired": "expired: propose it again",
             "open": f"{len(approvals)} of {needed} approvals ({', '.join(approvals) or 'none'}), {left} left"}
    return {"proposal": found.proposal, "kind": found.kind.name.lower(), "subject": found.subject, "data": found.data,
            "state": state, "approvals": approvals, "needed": needed, "seconds_left": max(0, found.deadline - now),
            "words": _describe_change(found, sites), "state_words": words[state]}


def _describe_change(found: ChangeProposal, sites: list[SiteRecord]) -> str:
    name = next((s.name for s in sites if s.address == found.subject), found.subject)
    if found.kind is Change.ADMIT:
        named = bytes.fromhex(found.data).rstrip(b"\0").decode("utf-8", errors="replace")
        return f"admit {named} ({found.subject})"
    if found.kind is Change.REMOVE:
        return f"remove {name}"
    if found.kind is Change.ROTATE_KEY:
        return f"let {name} sign as 0x{found.data[-ADDRESS_DIGITS:]}"
    return f"retire, and go on with the contract {found.subject}"


def _find_site(contract: SwarmContract, name: str) -> SiteRecord:
    """The active site of this name or address. Raises `ConfigError`."""
    sites = [s for s in contract.get_sites() if s.active]
    found = [s for s in sites if name == s.name or name.lower() == s.address.lower()]
    if len(found) != 1:
        problem = "no active site is" if not found else f"{len(found)} active sites are"
        raise ConfigError(f"{problem} called {name!r}", hint="`swarmchain consortium list` shows names and addresses")
    return found[0]


def _require_address(text: str) -> str:
    from swarmchain.keys import read_checksum_address

    return read_checksum_address(text)
