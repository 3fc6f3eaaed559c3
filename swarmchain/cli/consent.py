"""`swarmchain run show`, `join`, `leave` and `stop`: a run in words, and a site's consent to it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swarmchain.cli.common import connect, example, json_option, load, open_desk, print_json, site_option, unlock
from swarmchain.errors import ConfigError

if TYPE_CHECKING:
    from swarmchain.chain import SwarmContract
    from swarmchain.cli.common import Desk
    from swarmchain.describe import Line
    from swarmchain.protocol import RunView
    from swarmchain.site import Site
    from swarmchain.store import Store

LOOK_S = 0.5

yes_option = click.option("--yes", "is_agreed", is_flag=True, help="Consent without being asked, as scripts must.")
like_option = click.option("--like", type=click.IntRange(min=1),
                           help="Say too how the spec differs from that of this earlier run.")


@click.command(epilog=example("swarmchain run show 1 --site north/site.toml"))
@click.argument("number", type=click.IntRange(min=1))
@site_option
@like_option
@json_option
def show(number: int, site_file: Path, like: int | None, as_json: bool) -> None:
    """A run in words, as whoever joins it is shown it: what leaves the site, panel, merge, windows. Needs no key."""
    from swarmchain.store import open_store

    config = load(site_file)
    contract = connect(config)
    view = contract.view_run(number)
    lines = describe_run(contract, open_store(config), view, like=like)
    if as_json:
        told = [{"what": what, "words": words} for what, words in lines]
        print_json({"run": number, "spec": view.spec, "words": told})
    else:
        click.echo(_lay_out(number, lines))


def _lay_out(number: int, lines: list[Line]) -> str:
    return "\n".join([f"run {number}", *(f"  {what:<16} {words}" for what, words in lines)])


@click.command(epilog=example("swarmchain run join 1 --site north/site.toml --yes"))
@click.argument("number", type=click.IntRange(min=1))
@site_option
@like_option
@yes_option
@json_option
def join(number: int, site_file: Path, like: int | None, is_agreed: bool, as_json: bool) -> None:
    """Give this site's consent to a run: shows its spec in words, checks that the data satisfy it, and asks."""
    config = load(site_file)
    with open_desk(config) as desk:
        told = give_consent(desk, number, like=like, is_agreed=is_agreed, is_quiet=as_json)
    if as_json:
        print_json(told)


def give_consent(desk: Desk, number: int, *, like: int | None = None, is_agreed: bool = False,
                 is_quiet: bool = False) -> dict[str, Any]:
    """Show, check, ask, join; nothing if the site has joined already. What was shown, as data.

    Raises
    ------
    ConfigError
        If nobody can be asked, or the answer is no.
    SwarmError
        If this site's data cannot satisfy the spec.
    """
    from swarmchain.errors import AlreadyJoined
    from swarmchain.work import check_run

    site, contract = desk.site, desk.site.contract
    name = site.config.name
    say: Callable[[str], None] = (lambda _: None) if is_quiet else click.echo
    view = contract.view_run(number)
    if site.index in view.joined:
        say(f"{name} has joined run {number} already")
        return {"run": number, "joined": True, "told": "joined already"}
    desk.publish_seal_key()  # first: what is sealed to this site is sealed to this key
    store = desk.open_sealed(number)
    spec = check_run(site.config, store, view, site=site.index, view_run=contract.view_run)
    lines = describe_run(contract, store, view, like=like)
    say(_lay_out(number, lines))
    _ask(f"Does {name} consent to run {number}?", is_agreed=is_agreed, is_quiet=is_quiet)
    try:
        contract.join_run(site.signer, number)
    except AlreadyJoined:
        say(f"{name} has joined run {number} already")
    else:
        say(f"{name} joined run {number}: {spec.task} “{spec.name}”")
    return {"run": number, "joined": True, "told": "joined", "spec": view.spec, "words": dict(lines)}


def describe_run(contract: SwarmContract, store: Store, view: RunView, *, like: int | None = None) -> list[Line]:
    """A run's spec and terms in words; with `like`, how it differs from another run's."""
    from swarmchain.describe import compare_specs, describe_spec, describe_terms
    from swarmchain.store import read_spec

    spec = read_spec(store, view.spec)
    sites = {record.site: record.name for record in contract.get_sites()}
    lines = [*describe_spec(spec), *describe_terms(view.terms, proposer=sites[view.proposer])]
    joined = ", ".join(sites[i] for i in sorted(view.joined)) or "nobody yet"
    lines.append(("joined", joined))
    if like is not None:
        before = read_spec(store, contract.view_run(like).spec)
        lines += describe_differences(compare_specs(before, spec), like)
    return lines


def describe_differences(found: list[Line], like: int) -> list[Line]:
    """How a spec differs from that of run `like`, for people."""
    if not found:
        return [(f"unlike run {like}", "in nothing")]
    return [(f"unlike run {like}", f"{field}: {words}") for field, words in found]


def _ask(question: str, *, is_agreed: bool, is_quiet: bool) -> None:
    if is_agreed:
        return
    if is_quiet or not sys.stdin.isatty():
        raise ConfigError("nobody is there to consent", hint="read the spec in words above, then add --yes")
    if not click.confirm(question, default=False):
        raise ConfigError("no consent was given", hint="nothing was sent; the run goes on without this site")


@click.command(epilog=example("swarmchain run leave 2 --site north/site.toml"))
@click.argument("number", type=click.IntRange(min=1))
@site_option
def leave(number: int, site_file: Path) -> None:
    """Withdraw this site's consent. Its agent does nothing more for the run, not even in a round that is open.

    An open round keeps the site in its count; from the next one on it is no member. Checkpoints that counted its
    contributions stay as they are.
    """
    from swarmchain.site import open_site

    config = load(site_file)
    with open_site(config, unlock(config)) as site:
        _leave(site, number)


def _leave(site: Site, number: int) -> None:
    from swarmchain.errors import NotJoined

    try:
        site.contract.leave_run(site.signer, number)
    except NotJoined:
        click.echo(f"{site.config.name} is not in run {number}")
    else:
        click.echo(f"{site.config.name} left run {number}")


@click.command(epilog=example("swarmchain run stop 2 --site north/site.toml"))
@click.argument("number", type=click.IntRange(min=1))
@site_option
def stop(number: int, site_file: Path) -> None:
    """Let this site's agent finish the round that is open, then leave the run. The other sites may go on.

    Waits until the agent has voted, or the round's deadline has passed; Ctrl-C ends the waiting and changes nothing.
    """
    from swarmchain.site import open_site

    config = load(site_file)
    contract = connect(config)
    signer = unlock(config)
    index = contract.get_site_index(signer.address)
    told = -1
    while (view := contract.view_run(number)).round_id and _owes(view, index):
        if told != view.round_id:
            click.echo(f"run {number}: waits for the end of round {view.round_id}")
            told = view.round_id
        time.sleep(LOOK_S)
    with open_site(config, signer) as site:
        _leave(site, number)


def _owes(view: RunView, site: int) -> bool:
    """Whether the site has something left to do in the newest round."""
    from swarmchain.protocol import Phase

    return site in view.joined and site in view.members - view.voted and view.phase in (Phase.COMMIT, Phase.VOTE)
