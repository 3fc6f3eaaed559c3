"""What several commands share: opening a site, printing JSON, stopping on signals."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swarmchain.config import SiteConfig, read_site_config
from swarmchain.errors import KeystoreError
from swarmchain.keys import SealKey, Signer, find_password, open_keystore, open_seal_key

if TYPE_CHECKING:
    from swarmchain.chain import SwarmContract
    from swarmchain.site import Site
    from swarmchain.store import Store

site_option = click.option(
    "--site", "site_file", type=click.Path(path_type=Path, dir_okay=False), default=Path("site.toml"),
    show_default=True, help="The site's settings.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for tools.")


def example(*lines: str) -> str:
    """Epilog with an example that pastes: click must not wrap it."""
    return "\b\nExample:\n  " + " \\\n    ".join(lines)


def unlock(config: SiteConfig) -> Signer:
    """The site's key; the password comes from the environment, the password file, or a prompt on a terminal."""
    path = config.resolve(config.keys.keystore)
    return unlock_keystore(path, find_password(config))


def unlock_seal_key(config: SiteConfig, password: str | None = None) -> SealKey | None:
    """The site's X25519 key, if it has one; see `unlock` for its password."""
    if config.keys.seal_key is None:
        return None
    path = config.resolve(config.keys.seal_key)
    return open_seal_key(path, ask_password(path, password or find_password(config)))


def unlock_keystore(path: Path, password: str | None) -> Signer:
    """Decrypt a keystore; without a password ask for it on a terminal."""
    return open_keystore(path, ask_password(path, password))


def ask_password(path: Path, password: str | None) -> str:
    """The password, from a terminal if it is not known yet."""
    if password is None:
        if not sys.stdin.isatty():
            raise KeystoreError(
                f"no password for {path}", hint="set SWARMCHAIN_PASSWORD, or [keys] password_file in site.toml"
            )
        password = str(click.prompt(f"Password of {path}", hide_input=True))
    return password


def open_sealed(config: SiteConfig, contract: SwarmContract, run: int | None) -> Store:
    """The site's store: through its seal key, if it has one, for the members of a run or for all sites."""
    from swarmchain.site import seal_store
    from swarmchain.store import open_store

    key = unlock_seal_key(config)
    return seal_store(open_store(config), key, contract, run)


@dataclass(frozen=True)
class Desk:
    """A site with all that it acts with: the contract that knows it, its store, and its seal key, if it has one."""

    site: Site
    store: Store
    seal_key: SealKey | None

    def open_sealed(self, run: int | None) -> Store:
        """The store, sealed to the members of a run, or to all sites."""
        from swarmchain.site import seal_store

        return seal_store(self.store, self.seal_key, self.site.contract, run)

    def publish_seal_key(self) -> None:
        """Say on chain which key is this site's; nothing if it stands there already."""
        from swarmchain.site import publish_seal_key

        if self.seal_key is not None:
            publish_seal_key(self.site, self.seal_key)


@contextlib.contextmanager
def open_desk(config: SiteConfig) -> Iterator[Desk]:
    """A site ready to act; one password opens both keys."""
    from swarmchain.site import open_site
    from swarmchain.store import open_store

    path = config.resolve(config.keys.keystore)
    password = ask_password(path, find_password(config))
    signer, seal_key = unlock_keystore(path, password), unlock_seal_key(config, password)
    with open_site(config, signer) as site:
        yield Desk(site, open_store(config), seal_key)


def connect(config: SiteConfig) -> SwarmContract:
    """The consortium's contract, as the site's settings name it, to read from."""
    from swarmchain.site import open_contract

    return open_contract(config)


def load(site_file: Path) -> SiteConfig:
    """Read site.toml."""
    return read_site_config(site_file)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, indent=2, sort_keys=True, default=str))


def interrupt_on_signals() -> None:
    """Let SIGTERM, as SIGINT, unwind the stack, so that every process that was started is ended.

    Set explicitly for SIGINT too: a shell starts background jobs with SIGINT ignored.
    """

    def handle(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def stop_on_signals() -> Callable[[], bool]:
    """A function that says whether SIGTERM or SIGINT came; the second signal ends the process at once."""
    stopped: list[int] = []

    def handle(number: int, frame: object) -> None:
        stopped.append(number)
        if len(stopped) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return lambda: bool(stopped)
