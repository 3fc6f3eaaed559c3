"""`swarmchain site`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from swarmchain.cli.common import example, json_option, print_json
from swarmchain.cli.doctor import doctor
from swarmchain.config import SiteCard, render_site_toml, write_file
from swarmchain.errors import ConfigError


@click.group()
def site() -> None:
    """Set up a site, and examine it."""


site.add_command(doctor)


@site.command(epilog=example(
    "swarmchain site init --name North --folder north --data cells/North.h5ad",
    "--label-column cell_type --store store"))
@click.option("--name", required=True, help="The institution's name, at most 32 bytes.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path(), help="Where site.toml goes. Default: here.")
@click.option("--data", type=click.Path(path_type=Path, dir_okay=False), required=True, help="AnnData file (.h5ad).")
@click.option("--label-column", required=True, help="Column of .obs that holds the cell type.")
@click.option("--store", required=True, help="The shared folder, or an fsspec URL.")
@click.option("--rpc-url", default="http://127.0.0.1:8545", show_default=True, help="An Ethereum node.")
@click.option("--deployment", type=click.Path(path_type=Path), default=Path("deployments/31337.json"),
              show_default=True, help="The consortium's deployment file; it may come later.")
@click.option("--password-file", type=click.Path(path_type=Path), help="Else SWARMCHAIN_PASSWORD, or a prompt.")
@json_option
def init(name: str, folder: Path, data: Path, label_column: str, store: str, rpc_url: str, deployment: Path,
         password_file: Path | None, as_json: bool) -> None:
    """Write site.toml, an encrypted keystore, and the card to hand to the other sites."""
    from swarmchain.data import read_names
    from swarmchain.keys import PASSWORD_VARIABLE, create_keystore, read_password_file

    target = folder / "site.toml"
    if target.exists():
        raise ConfigError(f"{target} exists already", hint="use another --folder, or edit the file")
    if not 1 <= len(name.encode()) <= 32:
        raise ConfigError(f"the site name {name!r} is not 1 to 32 bytes long", hint="shorten it")
    features, labels = read_names(data, label_column)
    if "://" not in store:
        Path(store).mkdir(parents=True, exist_ok=True)
        store = _relative(Path(store), folder)
    password = read_password_file(password_file) if password_file else os.environ.get(PASSWORD_VARIABLE)
    if password is None:
        password = click.prompt("Password for the new keystore", hide_input=True, confirmation_prompt=True)
    address = create_keystore(folder / "keystore.json", password)
    card = SiteCard(name=name, address=address, features=tuple(features), labels=tuple(labels))
    write_file(folder / "site-card.json", card.model_dump_json().encode() + b"\n")
    text = render_site_toml(
        name=name, rpc_url=rpc_url, deployment=_relative(deployment, folder), store=store,
        data=_relative(data, folder), label_column=label_column,
        password_file=_relative(password_file, folder) if password_file else None,
    )
    write_file(target, text.encode())
    if as_json:
        print_json({"site": str(target), "address": address, "features": len(features), "labels": labels})
    else:
        click.echo(f"{name}: address {address}, {len(features)} features, {len(labels)} labels\n"
                   f"wrote {target}, keystore.json (keep it and its password safe) and site-card.json (hand it out)")


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path.resolve(), folder.resolve())
