"""`swarmchain site doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from swarmchain.cli.common import (
    ask_password,
    example,
    json_option,
    print_json,
    site_option,
    unlock_keystore,
    unlock_seal_key,
)
from swarmchain.config import SiteConfig
from swarmchain.keys import SealKey, Signer, find_password

MARKS = {"ok": "✓", "failed": "✗", "warning": "!", "skipped": "–"}


@click.command(epilog=example("swarmchain site doctor --site north/site.toml --run 2"))
@site_option
@click.option("--run", type=click.IntRange(min=1),
              help="Examine the site for this run, joined or not. Default: all it has joined that are not over.")
@json_option
def doctor(site_file: Path, run: int | None, as_json: bool) -> int:
    """Examine a site before the night run: one line for each check, and the remedy where one fails.

    Signs and sends nothing. Exit code 0 if all is well, 1 if something has to be mended, 3 if only chain or store do
    not answer.
    """
    from swarmchain.doctor import compute_exit_code, examine_site

    asked: list[str] = []

    def unlock(config: SiteConfig) -> Signer:
        path = config.resolve(config.keys.keystore)
        asked.append(ask_password(path, find_password(config)))
        return unlock_keystore(path, asked[0])

    def unlock_seal(config: SiteConfig) -> SealKey | None:
        return unlock_seal_key(config, asked[0] if asked else None)

    findings = []
    for found in examine_site(site_file, unlock=unlock, unlock_seal=unlock_seal, run=run):
        findings.append(found)
        if not as_json:
            remedy = f" → {found.remedy}" if found.remedy else ""
            click.echo(f"{MARKS[found.status]} {found.check}: {found.words}{remedy}")
    code = compute_exit_code(findings)
    if as_json:
        print_json({"exit_code": code, "findings": [asdict(found) for found in findings]})
    return code
