"""`swarmchain run disclose` and `swarmchain run auditor-key`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from swarmchain.cli.common import (
    ask_password,
    connect,
    example,
    json_option,
    load,
    open_sealed,
    print_json,
    site_option,
)
from swarmchain.config import write_file
from swarmchain.errors import ConfigError
from swarmchain.keys import PASSWORD_VARIABLE, create_seal_key, read_password_file


@click.command("auditor-key", epilog=example("swarmchain run auditor-key --out auditor-key.json"))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The key's file.")
@click.option("--password-file", type=click.Path(path_type=Path), help="Else SWARMCHAIN_PASSWORD, or a prompt.")
@json_option
def auditor_key(out: Path, password_file: Path | None, as_json: bool) -> None:
    """Make a key that sites can disclose a run to, and print its public part to hand to them."""
    password = read_password_file(password_file) if password_file else os.environ.get(PASSWORD_VARIABLE)
    public = create_seal_key(out, ask_password(out, password))
    if as_json:
        print_json({"key": str(out), "public": public})
    else:
        click.echo(public)


@click.command(epilog=example("swarmchain run disclose 2 --site north/site.toml", f"--to {'9' * 64} --out run-2.keys"))
@click.argument("number", type=click.IntRange(min=1))
@site_option
@click.option("--to", required=True, help="The auditor's public key, as `run auditor-key` printed it.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file to write.")
@json_option
def disclose(number: int, site_file: Path, to: str, out: Path, as_json: bool) -> None:
    """Give an auditor what it takes to verify a sealed run: the content keys of its blobs, sealed to the auditor.

    They open this run's contributions and checkpoints and nothing else, and cannot be taken back.
    """
    from swarmchain.retention import find_blobs
    from swarmchain.sealed import SealedStore

    config = load(site_file)
    contract = connect(config)
    store = open_sealed(config, contract, number)
    if not isinstance(store, SealedStore):
        raise ConfigError("this site has no seal key, so it can open nothing that is sealed",
                          hint="[keys] seal_key in site.toml names it; `site init` makes one")
    digests = find_blobs(contract, store, number)
    write_file(out, store.disclose(sorted(digests), contract.key_of(number, 0), to=to), mode=0o600)
    if as_json:
        print_json({"run": number, "to": to, "out": str(out)})
    else:
        click.echo(f"wrote {out}: run {number}, for the key {to[:12]}…; `run verify {number} --keys` reads it")
