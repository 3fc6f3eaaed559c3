"""`swarmchain devchain` and `swarmchain deploy`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmchain.cli.common import example, json_option, print_json, stop_on_signals, unlock_keystore
from swarmchain.config import Deployment, SiteCard, read_deployment, read_site_card, write_file
from swarmchain.errors import ChainMismatch, ConfigError, DevchainError

if TYPE_CHECKING:
    from swarmchain.node import Node


@click.command(epilog=example("swarmchain devchain --port 8545"))
@click.option("--engine", type=click.Choice(["anvil", "hardhat"]), default="anvil", show_default=True,
              help="Which development chain.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="0 takes a free port.")
@click.option("--state", type=click.Path(path_type=Path, dir_okay=False),
              help="Anvil: go on from this file if it is there, and write it at the end.")
@json_option
def devchain(engine: str, port: int, state: Path | None, as_json: bool) -> None:
    """Run a development chain until Ctrl-C. Gas is free, and nothing is kept without --state."""
    from swarmchain.devchain import start_devchain

    stopping = stop_on_signals()
    if state is not None and engine != "anvil":
        raise ConfigError("--state goes with --engine anvil", hint="Hardhat keeps nothing")
    options = ["--state", str(state.resolve())] if state is not None else []
    with start_devchain(engine, port=port, options=options) as chain:  # type: ignore[arg-type]
        if as_json:
            print_json({"rpc_url": chain.rpc_url, "chain_id": chain.chain_id, "client": chain.client})
        else:
            click.echo(f"{chain.client} listens at {chain.rpc_url}, chain id {chain.chain_id}; Ctrl-C stops it")
        while not stopping():
            if not chain.is_alive():
                raise DevchainError(f"{engine} ended by itself", hint="start it again")
            time.sleep(0.1)
    click.echo("stopped", err=True)


@click.command(epilog=example(
    "swarmchain deploy --rpc-url http://127.0.0.1:8545 --keystore north/keystore.json", "--store store --yes"))
@click.option("--rpc-url", required=True, envvar="SWARMCHAIN_RPC_URL", help="A node of the consortium's chain.")
@click.option("--store", "store_url", help="Found with the sites whose cards lie in this store.")
@click.option("--site", "cards", type=click.Path(path_type=Path), multiple=True,
              help="A founding site's card, as `site init` wrote it; repeatable; in place of --store.")
@click.option("--keystore", type=click.Path(path_type=Path), required=True, help="Whose key pays for the deployment.")
@click.option("--password-file", type=click.Path(path_type=Path), help="Else SWARMCHAIN_PASSWORD, or a prompt.")
@click.option("--out", type=click.Path(path_type=Path), help="The file to write. Default: deployments/<chain id>.json.")
@click.option("--yes", "is_agreed", is_flag=True, help="Found with the cards of --store without being asked.")
@json_option
def deploy(rpc_url: str, store_url: str | None, cards: tuple[Path, ...], keystore: Path, password_file: Path | None,
           out: Path | None, is_agreed: bool, as_json: bool) -> None:
    """Deploy a consortium's contract. The deployer gets no power by it: there is no owner.

    Once deployed, the same command changes nothing and says so.
    """
    import os

    from swarmchain.chain import deploy_contract
    from swarmchain.keys import PASSWORD_VARIABLE, read_password_file
    from swarmchain.node import Node

    sites = _read_founders(store_url, cards)
    node = Node(rpc_url)
    path = out or Path("deployments") / f"{node.chain_id}.json"
    deployment, told = _find_deployed(node, path, sites), "is deployed already"
    if deployment is None:
        if store_url is not None:
            _ask_for_founders(sites, is_agreed=is_agreed, is_quiet=as_json)
        password = read_password_file(password_file) if password_file else os.environ.get(PASSWORD_VARIABLE)
        signer = unlock_keystore(keystore, password)
        deployment, told = deploy_contract(node, signer, [(card.address, card.name) for card in sites]), "deployed"
        write_file(path, deployment.model_dump_json(indent=2).encode() + b"\n")
    if as_json:
        print_json({**deployment.model_dump(), "path": str(path), "told": told})
    else:
        click.echo(f"contract {deployment.contract} on chain {node.chain_id} {told}, {len(sites)} sites; see {path}")


def _read_founders(store_url: str | None, cards: tuple[Path, ...]) -> list[SiteCard]:
    if (store_url is None) == (not cards):
        raise ConfigError("who founds the consortium?", hint="give --store, or a --site for each founding site")
    if store_url is None:
        sites = [read_site_card(path) for path in cards]
    else:
        from swarmchain.planning import read_cards
        from swarmchain.store import Store

        sites = read_cards(Store(store_url))
    names = [card.name for card in sites]
    if not sites:
        raise ConfigError(f"no card lies in {store_url}", hint="`swarmchain site init` puts each site's there")
    if len(set(names)) != len(names):
        raise ConfigError("two sites have the same name", hint="give each site its own: `swarmchain site init --name`")
    return sites


def _find_deployed(node: Node, path: Path, sites: list[SiteCard]) -> Deployment | None:
    """What the file at `path` names, if it lies on this chain. Raises `ConfigError` if that is another consortium."""
    from swarmchain.chain import SwarmContract

    if not path.exists():
        return None
    found = read_deployment(path)
    try:
        SwarmContract(node, found)
    except ChainMismatch:
        return None  # of another chain, or of one that was thrown away
    if found.sites != {card.name: card.address for card in sites}:
        raise ConfigError(f"{path} names a consortium of {', '.join(found.sites)} on this chain",
                          hint="`swarmchain consortium propose` changes it; for one more give another --out")
    return found


def _ask_for_founders(sites: list[SiteCard], *, is_agreed: bool, is_quiet: bool) -> None:
    """Anyone who writes to the store can put a card there: a person compares names and addresses."""
    if not is_quiet:
        click.echo("\n".join(["cards in the store:", *(f"  {card.address}  {card.name}" for card in sites)]))
    if is_agreed:
        return
    if is_quiet or not sys.stdin.isatty():
        raise ConfigError("nobody is there to compare the sites' addresses", hint="compare them, then add --yes")
    if not click.confirm("Are these the founding sites, each with the address that it told you?"):
        raise ConfigError("the founding sites are others", hint="remove cards that are not theirs, or use --site")
