"""`swarmchain run propose`, and `run start`, which plans, proposes and joins in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swarmchain.cli.common import connect, example, json_option, load, open_desk, print_json, site_option
from swarmchain.cli.consent import describe_differences, give_consent, like_option, yes_option
from swarmchain.cli.plans import cell_type_options, make_cell_type, make_statistics, statistics_options
from swarmchain.config import SiteConfig, read_site_card
from swarmchain.errors import ConfigError, SwarmError
from swarmchain.protocol import Terms

if TYPE_CHECKING:
    from swarmchain.describe import Line
    from swarmchain.site import Site
    from swarmchain.spec import Spec
    from swarmchain.store import Store


def terms_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a run's proposer fixes on chain."""
    for option in (
        click.option("--quorum", type=click.FloatRange(0, 1), default=0.0, show_default=True,
                     help="Share of the members that must accept a checkpoint; a majority in any case."),
        click.option("--sites-min", type=click.IntRange(min=1), default=2, show_default=True,
                     help="Contributions that a round needs."),
        click.option("--vote-window", type=click.IntRange(min=1), default=1800, show_default=True,
                     help="Seconds that a round waits for votes."),
        click.option("--commit-window", type=click.IntRange(min=1), default=3600, show_default=True,
                     help="Seconds that a round waits for contributions."),
    ):
        command = option(command)
    return command


def _read_terms(options: dict[str, Any]) -> Terms:
    commit_s, vote_s, sites_min = (options.pop(name) for name in ("commit_window", "vote_window", "sites_min"))
    return Terms(commit_s, vote_s, sites_min, round(options.pop("quorum") * 10_000))


@click.command(epilog=example("swarmchain run propose --site north/site.toml --spec training.json"))
@site_option
@click.option("--spec", "spec_file", type=click.Path(path_type=Path), required=True,
              help="Spec, as `run new` wrote it.")
@terms_options
@like_option
@click.option("--again", is_flag=True, help="Propose it once more, even where the same run is not over.")
@json_option
def propose(site_file: Path, spec_file: Path, like: int | None, again: bool, as_json: bool, **options: Any) -> None:
    """Put a spec into the store and its digest on chain. It binds nobody until they join, the proposer included.

    Says how the spec differs from that of the newest earlier run of its task.
    """
    from swarmchain.spec import parse_spec

    config = load(site_file)
    try:
        spec = parse_spec(spec_file.read_bytes())
    except OSError as exc:
        raise ConfigError(f"cannot read {spec_file}: {exc.strerror}", hint="`swarmchain run new` writes one") from exc
    with open_desk(config) as desk:
        site, store = desk.site, desk.store
        like, differences = compare_to_earlier(site, store, spec, like)
        number, told = _propose(site, store, spec, terms=_read_terms(options), again=again)
        digest = site.contract.view_run(number).spec
    if as_json:
        print_json({"run": number, "spec": digest, "told": told, "like": like,
                    "differences": [{"field": field, "words": words} for field, words in differences]})
        return
    click.echo(f"run {number} {told}: {spec.task} “{spec.name}”, spec {digest[:12]}…")
    for what, words in describe_differences(differences, like) if like else ():
        click.echo(f"  {what}  {words}")


def _propose(site: Site, store: Store, spec: Spec, *, terms: Terms, again: bool) -> tuple[int, str]:
    """Number of the run, and what was done; the same spec under the same terms is proposed once, until it is over."""
    from swarmchain.duties import is_over
    from swarmchain.spec import encode_spec

    digest = store.put_blob(encode_spec(spec))
    for number in range(site.contract.get_run_count(), 0, -1) if not again else ():
        view = site.contract.view_run(number)
        is_same = (view.spec, view.terms, view.proposer) == (digest, terms, site.index)
        if is_same and not is_over(view, spec.limits):
            return number, "is proposed already"
    return site.contract.propose_run(site.signer, spec=digest, terms=terms), "proposed"


def compare_to_earlier(site: Site, store: Store, spec: Spec, like: int | None) -> tuple[int | None, list[Line]]:
    """How a spec differs from that of run `like`, or of the newest run of its task that has another spec."""
    from swarmchain.describe import compare_specs
    from swarmchain.spec import compute_spec_digest
    from swarmchain.store import read_spec

    digest = compute_spec_digest(spec)
    for number in range(site.contract.get_run_count(), 0, -1) if like is None else (like,):
        view = site.contract.view_run(number)
        try:
            before = read_spec(store, view.spec)
        except SwarmError:
            if like is not None:
                raise
            continue  # whoever proposed it never put it into the store
        if like is not None or (before.task == spec.task and view.spec != digest):
            return number, compare_specs(before, spec)
    return None, []


@click.group()
def start() -> None:
    """Plan a run, propose it, and give this site's consent: `run new`, `run propose` and `run join` in one."""


def start_options(command: Callable[..., None]) -> Callable[..., None]:
    """What every start takes."""
    return site_option(terms_options(yes_option(json_option(command))))


@start.command(epilog=example("swarmchain run start statistics --site north/site.toml --yes"))
@click.option("--card", "cards", type=click.Path(path_type=Path), multiple=True,
              help="A site's card; repeatable. Default: the cards of all active sites, from the store.")
@statistics_options
@start_options
def statistics(cards: tuple[Path, ...], site_file: Path, is_agreed: bool, as_json: bool, **options: Any) -> None:
    """Sum moments and counts over the sites: for the choice of features, means, SDs and class balance."""
    from swarmchain.planning import read_cards
    from swarmchain.store import open_store

    config = load(site_file)
    if cards:
        found = [read_site_card(path) for path in cards]
    else:
        active = {s.address: s.name for s in connect(config).get_sites() if s.active}
        found = read_cards(open_store(config), only=active)
    terms = _read_terms(options)
    _start(config, make_statistics(found, **options), terms=terms, is_agreed=is_agreed, as_json=as_json)


@start.command("cell-type", epilog=example(
    "swarmchain run start cell-type --site north/site.toml --statistics 1 --rounds 12 --yes"))
@cell_type_options
@start_options
def cell_type(site_file: Path, is_agreed: bool, as_json: bool, **options: Any) -> None:
    """Train a cell-type classifier on what a statistics run found."""
    config = load(site_file)
    terms = _read_terms(options)
    _start(config, make_cell_type(config, **options), terms=terms, is_agreed=is_agreed, as_json=as_json)


def _start(config: SiteConfig, spec: Spec, *, terms: Terms, is_agreed: bool, as_json: bool) -> None:
    with open_desk(config) as desk:
        number, told = _propose(desk.site, desk.store, spec, terms=terms, again=False)
        if not as_json:
            click.echo(f"run {number} {told}: {spec.task} “{spec.name}”")
        found = give_consent(desk, number, is_agreed=is_agreed, is_quiet=as_json)
    if as_json:
        print_json({**found, "proposed": told == "proposed"})
