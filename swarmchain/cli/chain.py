"""`swarmchain devchain` and `swarmchain deploy`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from swarmchain.cli.common import example, json_option, print_json, stop_on_signals, unlock_keystore
from swarmchain.config import read_site_card, write_file
from swarmchain.errors import ConfigError, DevchainError


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
    "swarmchain deploy --rpc-url http://127.0.0.1:8545 --keystore north/keystore.json",
    "--site north/site-card.json --site east/site-card.json --site south/site-card.json"))
@click.option("--rpc-url", required=True, envvar="SWARMCHAIN_RPC_URL", help="A node of the consortium's chain.")
@click.option("--site", "cards", type=click.Path(path_type=Path), multiple=True, required=True,
              help="A founding site's card, as `site init` wrote it; repeatable.")
@click.option("--keystore", type=click.Path(path_type=Path), required=True, help="Whose key pays for the deployment.")
@click.option("--password-file", type=click.Path(path_type=Path), help="Else SWARMCHAIN_PASSWORD, or a prompt.")
@click.option("--out", type=click.Path(path_type=Path), help="The file to write. Default: deployments/<chain id>.json.")
@json_option
def deploy(rpc_url: str, cards: tuple[Path, ...], keystore: Path, password_file: Path | None, out: Path | None,
           as_json: bool) -> None:
    """Deploy a consortium's contract. The deployer gets no power by it: there is no owner."""
    import os

    from swarmchain.chain import deploy_contract
    from swarmchain.keys import PASSWORD_VARIABLE, read_password_file
    from swarmchain.node import Node

    sites = [read_site_card(path) for path in cards]
    names = [card.name for card in sites]
    if len(set(names)) != len(names):
        raise ConfigError("two sites have the same name", hint="give each site its own: `swarmchain site init --name`")
    node = Node(rpc_url)
    password = read_password_file(password_file) if password_file else os.environ.get(PASSWORD_VARIABLE)
    signer = unlock_keystore(keystore, password)
    deployment = deploy_contract(node, signer, [(card.address, card.name) for card in sites])
    path = out or Path("deployments") / f"{node.chain_id}.json"
    write_file(path, deployment.model_dump_json(indent=2).encode() + b"\n")
    if as_json:
        print_json({**deployment.model_dump(), "path": str(path)})
    else:
        click.echo(f"contract {deployment.contract} on chain {node.chain_id}, {len(sites)} sites; wrote {path}")
