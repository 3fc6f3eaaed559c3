"""A sealed run on S3 that a site joins half-way: what it can read; and no secret shows outside its file."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from desk import read_json, swarmchain
from eth_account import Account
from seaweed import ACCOUNTS, Seaweed
from test_sealed import write_options

from swarmchain.checkpoint import compute_size
from swarmchain.config import SiteCard
from swarmchain.consortium import Consortium, LocalSite, start_consortium
from swarmchain.errors import NotRecipient
from swarmchain.history import RoundRecord, read_rounds
from swarmchain.keys import SealKey, create_keystore, create_seal_key, open_keystore, open_seal_key
from swarmchain.layouts import checkpoint_layout, contribution_layout
from swarmchain.protocol import Terms
from swarmchain.sealed import SealedStore
from swarmchain.site import seal_store
from swarmchain.spec import Limits, RehearsalSpec
from swarmchain.store import Store, read_checkpoint

SITES = ("North", "East", "South")
ROUNDS = 14
SPEC = RehearsalSpec(name="sealed", widths=(40, 30), limits=Limits(rounds=ROUNDS, sites_to_start=3))


@dataclass
class Night:
    """The run when it is over: who took part, and all that was said, shown and stored meanwhile."""

    swarm: Consortium
    run: int
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    commands: set[str] = field(default_factory=set)

    @property
    def west(self) -> LocalSite:
        return self.swarm.sites[3]

    def open_key(self, site: LocalSite) -> SealKey:
        return open_seal_key(site.folder / "seal-key.json", read_password(site))

    def open_store(self, site: LocalSite) -> SealedStore:
        store = seal_store(self.swarm.store, self.open_key(site), self.swarm.contract, self.run)
        assert isinstance(store, SealedStore)
        return store

    def read_rounds(self) -> list[RoundRecord]:
        return read_rounds(self.swarm.contract, self.open_store(self.swarm.sites[0]), self.run)

    def take(self, name: str, event: dict[str, Any]) -> None:
        self.events.append((name, event))
        self.commands |= list_commands()


def read_password(site: LocalSite) -> str:
    return (site.folder / "password.txt").read_text().strip()


def list_commands() -> set[str]:
    """What `ps` shows of every process: its argument list."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it has ended
    return found


def add_site(swarm: Consortium, name: str, seaweed: Seaweed) -> LocalSite:
    """Keys, settings and card of a fourth hospital, that is no member yet."""
    first, folder = swarm.sites[0], swarm.folder / name
    folder.mkdir()
    password = "correct horse of the west"
    (folder / "password.txt").write_text(password + "\n")
    (folder / "password.txt").chmod(0o600)
    address = create_keystore(folder / "keystore.json", password, secret=b"\x5a" * 32, work_log2=4)
    create_seal_key(folder / "seal-key.json", password, is_cheap=True)
    (folder / "site.toml").write_text(first.toml.read_text().replace(f'"{first.name}"', f'"{name}"'))
    write_options(folder, seaweed)
    card = SiteCard(name=name, address=address, features=(), labels=())
    (folder / "site-card.json").write_text(card.model_dump_json())
    return LocalSite(name, folder, open_keystore(folder / "keystore.json", password), card)


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory, seaweed: Seaweed) -> Iterator[Night]:
    url = "s3://swarm/joined"
    with start_consortium(tmp_path_factory.mktemp("sealed"), dict.fromkeys(SITES), seed=4) as swarm:
        for site in swarm.sites:
            create_seal_key(site.folder / "seal-key.json", read_password(site), is_cheap=True)
            write_options(site.folder, seaweed)
            text = site.toml.read_text().replace('# seal_key = "seal-key.json"', 'seal_key = "seal-key.json"')
            site.toml.write_text(text.replace('url = "../store"', f'url = "{url}"\noptions_file = "store.toml"'))
        swarm.store = Store(url, options=seaweed.options())
        found = Night(swarm, swarm.propose(SPEC, terms=Terms(120, 60, 2)))
        swarm.start_agents([found.run])
        view = swarm.contract.view_run
        swarm.follow(found.take, until=lambda: view(found.run).finalized_round >= 3, timeout_s=120)
        # the run goes on while the others admit West, and West joins
        west = add_site(swarm, "West", seaweed)
        admitted = read_json("consortium", "propose", "admit", "West/site-card.json", "--site", "North/site.toml",
                             folder=swarm.folder)
        swarmchain("consortium", "approve", admitted["proposal"], "--site", "East/site.toml", folder=swarm.folder)
        swarmchain("run", "join", found.run, "--site", "West/site.toml", "--yes", folder=swarm.folder)
        swarm.sites.append(west)
        swarm.start_agent(west, [found.run])
        swarm.follow(found.take, timeout_s=200)
        assert view(found.run).finalized_round == ROUNDS
        yield found


def find_first(night: Night) -> int:
    """The first round whose checkpoint counts West."""
    return next(r.round_id for r in night.read_rounds() if r.manifest and any(i.site == 3 for i in r.manifest.included))


def test_site_that_joins_half_way_takes_part_until_the_end(night: Night) -> None:
    records, first = night.read_rounds(), find_first(night)
    assert 3 < first < ROUNDS
    assert all(len(r.manifest.included) == 4 for r in records[first - 1 :] if r.manifest)
    assert [r.manifest is not None for r in records] == [True] * ROUNDS
    ends = {name: event["checkpoint"] for name, event in night.events if event["event"] == "ended"}
    assert ends == dict.fromkeys((*SITES, "West"), records[-1].checkpoint)


def test_it_reads_from_its_first_round_on_and_nothing_before(night: Night) -> None:
    west, records, first = night.open_store(night.west), night.read_rounds(), find_first(night)
    bytes_max = compute_size(contribution_layout(SPEC))
    assert read_checkpoint(west, records[first - 2].checkpoint, SPEC)  # what its first round started from
    for record in records[first - 1 :]:
        assert record.manifest is not None and read_checkpoint(west, record.checkpoint, SPEC)
        for item in record.manifest.included:
            assert west.get_blob(item.digest, bytes_max=bytes_max)
    # the round before may be open to it: the others rate that round's contributions when West is a member already
    early = [r for r in records[: first - 2] if r.manifest is not None]
    assert early
    for record in early[:-1]:
        assert record.manifest is not None
        digests = {record.checkpoint: checkpoint_layout(SPEC),
                   **{item.digest: contribution_layout(SPEC) for item in record.manifest.included}}
        for digest, layout in digests.items():
            with pytest.raises(NotRecipient):
                west.get_blob(digest, bytes_max=compute_size(layout))


# -- secrets


def list_secrets(night: Night) -> dict[str, bytes]:
    """Everything that must stay in its file, by what it is."""
    key, secret, _ = ACCOUNTS["admin"]
    secrets = {"access key": key.encode(), "secret key": secret.encode()}
    for site in night.swarm.sites:
        password, seal = read_password(site), night.open_key(site)
        signing = Account.decrypt((site.folder / "keystore.json").read_text(), password)
        secrets |= {f"password of {site.name}": password.encode(), f"key of {site.name}": bytes(signing),
                    f"seal key of {site.name}": seal._secret}
    records = night.read_rounds()
    context = night.open_store(night.west)._context
    # of checkpoints any member may be the sealer
    for site in night.swarm.sites:
        secrets[f"content key of {site.name}"] = night.open_key(site).derive_content_key(context, records[0].checkpoint)
    return secrets


def search(places: Mapping[str, Iterable[bytes]], secrets: Mapping[str, bytes]) -> list[str]:
    """Where a secret shows, as it is, in hexadecimal digits of either case, or in Base64."""
    found = []
    for where, texts in places.items():
        for text in texts:
            lower = text.lower()
            found += [f"{what}: {where}" for what, secret in secrets.items()
                      if secret in text or secret.hex().encode() in lower or base64.b64encode(secret)[:-2] in text]
    return found


def list_inputs(night: Night) -> list[bytes]:
    """Every transaction of the chain, all that it carries."""
    web3 = night.swarm.contract.node.web3
    blocks = [web3.eth.get_block(number, True) for number in range(web3.eth.block_number + 1)]
    return [bytes(transaction["input"]) for block in blocks for transaction in block["transactions"]]


def run_commands(night: Night) -> list[bytes]:
    """What commands of a site print, as processes, refusals and wrong passwords among them."""
    site, run = "North/site.toml", str(night.run)
    said = []
    for words, code, changes in (
        (("site", "doctor", "--run", run, "--json"), None, {}), (("run", "verify", run, "--json"), 0, {}),
        (("status", "--json"), 0, {}), (("store", "prune", "--keep-rounds", "5", "--dry-run"), 0, {}),
        (("run", "verify", "99"), 1, {}),
        (("agent",), 1, {"SWARMCHAIN_PASSWORD": "a wrong password"}),
    ):
        # the settings' password file has the last word, so a wrong password needs one of its own
        folder = night.swarm.folder
        if changes:
            text = (folder / site).read_text().replace("password.txt", "wrong.txt")
            (folder / "North" / "wrong.toml").write_text(text)
            (folder / "North" / "wrong.txt").write_text("a wrong password\n")
            (folder / "North" / "wrong.txt").chmod(0o600)
        where = "North/wrong.toml" if changes else site
        done = subprocess.run([sys.executable, "-m", "swarmchain", *words, "--site", where], cwd=folder,
                              capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
        assert code is None or done.returncode == code, (words, done.stderr.decode())
        said.append(done.stdout + done.stderr)
    return said


def test_no_secret_shows_outside_its_file(night: Night) -> None:
    objects, root = night.swarm.store._objects, night.swarm.store._root
    raw = [objects.read(item.path, bytes_max=1 << 20) for kind in ("blobs", "openings", "sealed", "cards")
           for item in objects.list(f"{root}/{kind}")]
    places = {
        "argument lists": [command.encode() for command in night.commands | list_commands()],
        "logs": [path.read_bytes() for site in night.swarm.sites for path in (site.log, site.errors)],
        "events": [json.dumps(event).encode() for _, event in night.events],
        "commands": run_commands(night), "store": raw, "chain": list_inputs(night),
        "settings": [path.read_bytes() for path in (*(site.toml for site in night.swarm.sites),
                                                    night.swarm.folder / "deployment.json")],
    }
    secrets = list_secrets(night)
    assert all(any(texts) for name, texts in places.items() if name != "logs"), "there is something to search"
    assert any(str(site.toml).encode() in text for site in night.swarm.sites for text in places["argument lists"])
    assert len(places["chain"]) > 4 * ROUNDS and len(raw) > 4 * ROUNDS
    assert search(places, secrets) == []
    # the same search finds each secret, in each form, where one is planted
    for what, secret in secrets.items():
        for form in (secret, secret.hex().upper().encode(), base64.b64encode(secret)):
            assert search({"here": [b"x" + form + b"y"]}, secrets) == [f"{what}: here"]


def test_files_with_secrets_are_their_owners_alone(night: Night) -> None:
    private = ("keystore.json", "seal-key.json", "password.txt", "store.toml", "work/journal.sqlite")
    for site in night.swarm.sites:
        assert [name for name in private if (site.folder / name).stat().st_mode & 0o077] == []
        for path in (site.folder / "work").rglob("*"):
            if path.is_file() and "journal" in path.name:
                assert not path.stat().st_mode & 0o077, path
