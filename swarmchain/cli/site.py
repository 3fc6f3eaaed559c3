"""`swarmchain site`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from swarmchain.cli.common import example, json_option, load, print_json, site_option
from swarmchain.cli.doctor import doctor
from swarmchain.config import DataConfig, SiteCard, write_file
from swarmchain.errors import ConfigError, StoreError, Unreachable
from swarmchain.site_text import render_site_toml


@click.group()
def site() -> None:
    """Set up a site, and examine it."""


site.add_command(doctor)


@site.command(epilog=example(
    "swarmchain site init --name North --folder north --data cells/North.h5ad",
    "--label-column cell_type --store store"))
@click.option("--name", required=True, help="The institution's name, at most 32 bytes.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path(), help="Where site.toml goes. Default: here.")
@click.option("--data", type=click.Path(path_type=Path), required=True,
              help="The cells: .h5ad, .zarr, .fcs or a folder of them, a 10x folder or .h5, .csv or .tsv.")
@click.option("--label-column", required=True,
              help="Column of .obs (or of --labels) that holds the cell type, or the donor's label.")
@click.option("--labels", type=click.Path(path_type=Path, dir_okay=False),
              help="A table of labels beside the cells, where the file itself has none.")
@click.option("--donor-column", help="Column that says whose a cell is, for runs on donors.")
@click.option("--sample-column", help="Column that tells one donor's samples apart.")
@click.option("--store", required=True, help="The shared folder, or an fsspec URL.")
@click.option("--rpc-url", default="http://127.0.0.1:8545", show_default=True, help="An Ethereum node.")
@click.option("--deployment", type=click.Path(path_type=Path), default=Path("deployments/31337.json"),
              show_default=True, help="The consortium's deployment file; it may come later.")
@click.option("--password-file", type=click.Path(path_type=Path), help="Else SWARMCHAIN_PASSWORD, or a prompt.")
@json_option
def init(name: str, folder: Path, data: Path, label_column: str, labels: Path | None, donor_column: str | None,
         sample_column: str | None, store: str, rpc_url: str, deployment: Path, password_file: Path | None,
         as_json: bool) -> None:
    """Write site.toml, encrypted keys, and the card for the other sites, which goes into the store too.

    Once done, the same command changes nothing and says so.
    """
    from swarmchain.data import read_names
    from swarmchain.keys import PASSWORD_VARIABLE, create_keystore, create_seal_key, read_password_file

    target = folder / "site.toml"
    if not 1 <= len(name.encode()) <= 32:
        raise ConfigError(f"the site name {name!r} is not 1 to 32 bytes long", hint="shorten it")
    settings = DataConfig(path=str(data), label_column=label_column, labels=str(labels) if labels else None)
    if "://" not in store:
        store = _relative(Path(store), folder)
    text = render_site_toml(
        name=name, rpc_url=rpc_url, deployment=_relative(deployment, folder), store=store,
        data=_relative(data, folder), label_column=label_column, donor_column=donor_column, sample_column=sample_column,
        labels=_relative(labels, folder) if labels else None, seal_key="seal-key.json",
        password_file=_relative(password_file, folder) if password_file else None,
    )
    if target.exists():
        if target.read_text(encoding="utf-8") != text or not (folder / "keystore.json").exists():
            raise ConfigError(f"{target} exists already, with other settings",
                              hint="use another --folder, or edit the file")
        _tell(_publish_card(target), told="is set up already", as_json=as_json, target=target)
        return
    read_names(data, label_column, settings=settings)  # says what is wrong with the file before anything is written
    password = read_password_file(password_file) if password_file else os.environ.get(PASSWORD_VARIABLE)
    if password is None:
        password = click.prompt("Password for the new keystore", hide_input=True, confirmation_prompt=True)
    create_keystore(folder / "keystore.json", password)
    create_seal_key(folder / "seal-key.json", password)
    write_file(target, text.encode())
    if "://" not in store:
        (folder / store).mkdir(parents=True, exist_ok=True)
    _tell(_publish_card(target), told="is set up", as_json=as_json, target=target)


@site.command(epilog=example("swarmchain site card --site north/site.toml"))
@site_option
@json_option
def card(site_file: Path, as_json: bool) -> None:
    """Write the site's card anew, after a change of data or [data.label_map], and put it into the store."""
    _tell(_publish_card(site_file), told="has a new card", as_json=as_json, target=site_file)


def _publish_card(site_file: Path) -> SiteCard:
    """The card as the site's settings and data give it, on disk and in the store; a store may also come later."""
    from swarmchain.data import read_names
    from swarmchain.keys import read_address
    from swarmchain.store import open_store

    config = load(site_file)
    settings = config.cells
    if settings is None:
        raise ConfigError(f"{site_file} has no [data] section", hint="name the site's AnnData file there")
    features, labels = read_names(Path(settings.path), settings.label_column, settings=settings)
    found = SiteCard(name=config.name, address=read_address(config.resolve(config.keys.keystore)),
                     features=tuple(features), labels=tuple(labels))
    data = found.model_dump_json().encode() + b"\n"
    write_file(config.resolve("site-card.json"), data)
    try:
        open_store(config).put_card(found.address, data)
    except (StoreError, Unreachable) as exc:
        click.echo(f"the card is not in the store yet: {exc.message}; `swarmchain site card` tries again", err=True)
    return found


def _tell(found: SiteCard, *, told: str, as_json: bool, target: Path) -> None:
    if as_json:
        print_json({"site": str(target), "address": found.address, "features": len(found.features),
                    "labels": found.labels, "told": told})
    else:
        click.echo(f"{found.name} {told}: address {found.address}, {len(found.features)} features, "
                   f"{len(found.labels)} labels\n"
                   f"see {target}, keystore.json and seal-key.json (keep both and their password safe),\n"
                   "and site-card.json, which the others find in the store")


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path.resolve(), folder.resolve())
