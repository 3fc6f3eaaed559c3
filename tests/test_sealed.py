"""A sealed swarm: real keys on a real contract, and who reads what when sites join, leave, rotate and audit."""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import World
from seaweed import Seaweed
from test_audit import Play

from swarmchain.audit import audit_run, read_record
from swarmchain.certify import gather_one
from swarmchain.cli import cli
from swarmchain.consortium import start_consortium
from swarmchain.errors import ConfigError, KeystoreError, NotRecipient, StoreError
from swarmchain.keys import SealKey, create_seal_key, open_seal_key, read_seal_public
from swarmchain.layouts import contribution_layout
from swarmchain.protocol import Change, RoundKey, compute_digest
from swarmchain.retention import plan_pruning, prune
from swarmchain.sealed import DisclosedStore, SealedStore, open_disclosure
from swarmchain.sealing import parse_envelope
from swarmchain.site import find_seal_keys, seal_store
from swarmchain.spec import Limits, RehearsalSpec
from swarmchain.spool import Spool
from swarmchain.store import Store, read_checkpoint

HERE = RoundKey(31337, "0x" + "1" * 40, 1, 1)
KEYS = [SealKey(bytes([i + 1]) * 32) for i in range(4)]


@dataclass
class Members:
    """Who is to read from now on."""

    keys: list[SealKey] = field(default_factory=lambda: KEYS[:3])

    def __call__(self) -> list[str]:
        return [key.public for key in self.keys]


@pytest.fixture
def members() -> Members:
    return Members()


def views(store: Store, members: Members) -> list[SealedStore]:
    return [SealedStore(store, key, context="31337-0x11", members=members) for key in KEYS]


def test_member_reads_what_another_sealed_and_the_operator_does_not(tmp_path: Path, members: Members) -> None:
    plain = Store(str(tmp_path))
    north, east, _, outsider = views(plain, members)
    data = b"weights of a hospital " * 1000
    digest = north.put_blob(data)
    assert digest == compute_digest(data) and north.has_blob(digest) and not plain.has_blob(digest)
    assert east.get_blob(digest, bytes_max=len(data)) == data
    room = memoryview(bytearray(len(data)))
    assert east.read_many([(digest, room)]) == [None] and bytes(room) == data
    assert not any(b"hospital" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(NotRecipient, match="not sealed to"):
        outsider.get_blob(digest, bytes_max=len(data))
    with pytest.raises(StoreError, match="longer than"):
        east.get_blob(digest, bytes_max=len(data) - 1)
    for name in plain.list_blobs():
        plain.require_whole(name)  # who holds no key can still see that nothing was altered
    public = north.put_public(b"a spec")
    assert plain.get_blob(public, bytes_max=10) == outsider.get_blob(public, bytes_max=10) == b"a spec"


def test_bytes_that_move_through_a_view_count_for_its_store(tmp_path: Path, members: Members) -> None:
    """An agent's metrics ask the store; each run has a view of its own."""
    store = Store(str(tmp_path))
    first, second = views(store, members)[:2]
    digest = first.put_blob(b"x" * 1000)
    assert store.bytes_up > 1000
    before = store.bytes_down
    second.get_blob(digest, bytes_max=1000)
    assert store.bytes_down >= before + 1000


def test_two_sites_that_seal_the_same_checkpoint_leave_one(tmp_path: Path, members: Members) -> None:
    plain = Store(str(tmp_path))
    north, east = views(plain, members)[:2]
    digest = north.put_blob(b"checkpoint")
    before = sorted(tmp_path.rglob("*"))
    assert east.put_blob(b"checkpoint") == digest and east.restore_blob(b"checkpoint") == digest
    assert sorted(tmp_path.rglob("*")) == before
    envelope = plain.get_envelope(digest, bytes_max=1 << 20)
    (tmp_path / "sealed" / digest).unlink()
    north.put_blob(b"checkpoint")
    assert plain.get_envelope(digest, bytes_max=1 << 20) == envelope  # the same bytes again


def test_joining_site_is_sealed_to_by_any_member_that_looks(tmp_path: Path, members: Members) -> None:
    _, east, _, newcomer = views(Store(str(tmp_path)), members)
    parent = views(Store(str(tmp_path)), members)[0].put_blob(b"parent checkpoint")
    members.keys = KEYS
    with pytest.raises(NotRecipient):
        newcomer.get_blob(parent, bytes_max=100)
    east.welcome(parent)
    assert newcomer.get_blob(parent, bytes_max=100) == b"parent checkpoint"


def test_removed_site_reads_nothing_new(tmp_path: Path, members: Members) -> None:
    north, _, south, _ = views(Store(str(tmp_path)), members)
    old = north.put_blob(b"of a round that it took part in")
    members.keys = KEYS[:2]
    new = north.put_blob(b"of the next round")
    assert south.get_blob(old, bytes_max=100) == b"of a round that it took part in"
    with pytest.raises(NotRecipient):
        south.get_blob(new, bytes_max=100)
    with pytest.raises(NotRecipient):
        south.welcome(new)


def test_selective_or_lying_sealer_is_put_right_by_the_first_who_reads(tmp_path: Path, members: Members) -> None:
    """A site cannot show its contribution to some members and, unseen, not to others."""
    plain = Store(str(tmp_path))
    north, east, south, _ = views(plain, members)
    liar = SealedStore(plain, KEYS[0], context="31337-0x11", members=lambda: [KEYS[1].public])
    digest = liar.put_blob(b"contribution")
    with pytest.raises(NotRecipient):
        south.get_blob(digest, bytes_max=100)
    east.get_blob(digest, bytes_max=100)
    assert south.get_blob(digest, bytes_max=100) == b"contribution"
    envelope = parse_envelope(plain.get_envelope(digest, bytes_max=1 << 20), digest)
    boxes = tuple(box.model_copy(update={"sealed": "00" * 80}) if box.key == KEYS[2].public else box
                  for box in envelope.boxes)
    east._put_envelope(envelope.model_copy(update={"boxes": boxes}))
    with pytest.raises(NotRecipient, match="does not open"):
        south.get_blob(digest, bytes_max=100)
    north.get_blob(digest, bytes_max=100)
    assert south.get_blob(digest, bytes_max=100) == b"contribution"


def test_member_with_a_key_that_is_none_harms_only_itself(tmp_path: Path) -> None:
    north = SealedStore(Store(str(tmp_path)), KEYS[0], context="c",
                        members=lambda: [KEYS[1].public, "00" * 32, "01" + "00" * 31])
    digest = north.put_blob(b"data")
    east = SealedStore(Store(str(tmp_path)), KEYS[1], context="c", members=lambda: [])
    assert east.get_blob(digest, bytes_max=10) == b"data"


@pytest.mark.parametrize("spoil", ["envelope", "ciphertext", "cut", "gone", "another's"])
def test_invalid_sealed_blob_is_refused_and_put_back_by_its_owner(tmp_path: Path, members: Members, spoil: str) -> None:
    plain = Store(str(tmp_path))
    north, east = views(plain, members)[:2]
    digest, other = north.put_blob(b"contribution"), north.put_blob(b"another one.")
    envelope = parse_envelope(plain.get_envelope(digest, bytes_max=1 << 20), digest)
    path = next(tmp_path.rglob(envelope.ciphertext))
    if spoil == "envelope":
        plain.put_envelope(digest, b"{}")
    elif spoil == "another's":
        plain.put_envelope(digest, plain.get_envelope(other, bytes_max=1 << 20))
    elif spoil == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + (b"" if spoil == "cut" else b"?"))
    with pytest.raises(StoreError):
        east.read_blob(digest, memoryview(bytearray(12)))
    north.restore_blob(b"contribution", digest=digest)
    assert east.get_blob(digest, bytes_max=100) == b"contribution"


# -- the key's file


def test_seal_key_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "seal-key.json"
    public = create_seal_key(path, "correct horse", secret=b"\7" * 32, is_cheap=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_seal_public(path) == public == open_seal_key(path, "correct horse").public
    assert (b"\7" * 32).hex() not in path.read_text() and "07" * 32 not in repr(SealKey(b"\7" * 32))
    with pytest.raises(KeystoreError, match="exists already"):
        create_seal_key(path, "correct horse")
    with pytest.raises(KeystoreError, match="wrong password"):
        open_seal_key(path, "battery staple")
    path.chmod(0o644)
    with pytest.raises(KeystoreError, match="readable by others"):
        open_seal_key(path, "correct horse")
    for text in ("", "{}", path.read_text().replace(public, "1" * 63), path.read_text().replace('"memlimit":', '"x":')):
        path.write_text(text)
        with pytest.raises(KeystoreError, match="no seal key"):
            read_seal_public(path)
    with pytest.raises(KeystoreError, match="cannot read"):
        open_seal_key(tmp_path / "nowhere", "x")


def test_invalid_seal_key_that_was_swapped(tmp_path: Path) -> None:
    path = tmp_path / "seal-key.json"
    public = create_seal_key(path, "p", secret=b"\7" * 32, is_cheap=True)
    path.write_text(path.read_text().replace(public, KEYS[0].public))
    with pytest.raises(KeystoreError, match="another key"):
        open_seal_key(path, "p")


# -- with the contract


@dataclass
class SealedPlay(Play):
    """Rounds by hand, sealed: each site reads through its own view."""

    plain: Store = field(init=False)

    def seal(self) -> None:
        contract = self.world.contract
        for signer, key in zip(self.world.signers, KEYS, strict=False):
            contract.set_seal_key(signer, key.public)
        self.plain, self.store = self.store, seal_store(self.store, KEYS[0], contract, self.run)

    def finalize(self, round_id: int, made: Any, **_: Any) -> None:
        pair = self.store.put_blob(bytes(made.checkpoint)), self.store.put_public(made.manifest_bytes)
        for signer in self.world.signers[:2]:
            self.world.contract.vote(signer, (self.run, round_id), *pair, accept=True, score_bps=5000)
        self.parent, self.previous = (pair[0], made.tensors), (pair[1], made.manifest)


@pytest.fixture
def play(world: World, tmp_path: Path) -> SealedPlay:
    limits = Limits(rounds=9, sites_to_start=3)
    found = SealedPlay(world, tmp_path, RehearsalSpec(name="sealed", widths=(4, 3), limits=limits))
    found.seal()
    return found


def test_contracts_members_read_through_removal_and_rotation(play: SealedPlay) -> None:
    contract, signers = play.world.contract, play.world.signers
    assert find_seal_keys(contract, play.run) == {key.public for key in KEYS[:3]}
    old = play.store.put_blob(b"before")
    contract.set_seal_key(signers[1], KEYS[3].public)  # rotated: the old key is lost, say
    proposal = contract.propose_change(signers[0], Change.REMOVE, subject=signers[2].address)
    contract.approve_change(signers[1], proposal)
    assert find_seal_keys(contract, play.run) == {KEYS[0].public, KEYS[3].public}
    new = play.store.put_blob(b"after")
    lost, removed, rotated = (seal_store(play.plain, key, contract, play.run) for key in KEYS[1:])
    assert rotated.get_blob(new, bytes_max=10) == b"after"
    with pytest.raises(NotRecipient):
        rotated.get_blob(old, bytes_max=10)
    play.store.welcome(old)
    assert rotated.get_blob(old, bytes_max=10) == b"before"
    for view in (lost, removed):
        assert view.get_blob(old, bytes_max=10) == b"before"
        with pytest.raises(NotRecipient):
            view.get_blob(new, bytes_max=10)


def test_sealed_round_is_merged_by_members_and_audited_with_disclosed_keys(play: SealedPlay) -> None:
    contract = play.world.contract
    for number in (1, 2):
        commitments = play.contribute(number, (0, 1, 2))
        play.finalize(number, play.certify(number, commitments))
    # another member gathers the same; whoever has no key does not
    key, layout = contract.key_of(play.run, 2), contribution_layout(play.spec)
    other = seal_store(play.plain, KEYS[1], contract, play.run)
    found = gather_one(other, Spool(play.folder / "other"), commitments[2], layout, key=key, site=2)
    assert not isinstance(found, str)
    blind = audit_run(read_record(contract, play.run), play.plain, spool_folder=play.folder)
    assert not blind.is_sound and all(r.included for r in blind.rounds)  # the certificates are in the clear
    auditor = SealKey(b"\x09" * 32)
    sealed = other.disclose([*(path.name for path in (play.folder / "store" / "sealed").iterdir()), "0" * 64],
                            contract.key_of(play.run, 0), to=auditor.public)
    disclosure = open_disclosure(sealed, auditor, contract.key_of(play.run, 0))
    assert len(disclosure.keys) == 8
    audit = audit_run(read_record(contract, play.run), DisclosedStore(play.plain, disclosure.keys),
                      spool_folder=play.folder)
    assert audit.is_sound and not audit.all_findings and all(r.is_recomputed for r in audit.rounds)


def test_invalid_disclosure(tmp_path: Path, members: Members) -> None:
    north, east = views(Store(str(tmp_path)), members)[:2]
    digest = north.put_blob(b"data")
    sealed = east.disclose([digest], HERE, to=KEYS[3].public)
    with pytest.raises(KeystoreError, match="not sealed to the key"):
        open_disclosure(sealed, KEYS[2], HERE)
    with pytest.raises(ConfigError, match="not run 1"):
        open_disclosure(sealed, KEYS[3], RoundKey(1, HERE.contract, 1, 0))
    with pytest.raises(StoreError, match="no X25519 key"):
        east.disclose([digest], HERE, to="11")
    disclosed = DisclosedStore(Store(str(tmp_path)), open_disclosure(sealed, KEYS[3], HERE).keys)
    assert disclosed.get_blob(digest, bytes_max=10) == b"data"
    other = north.put_blob(b"not disclosed")
    with pytest.raises(NotRecipient, match="was not disclosed"):
        disclosed.get_blob(other, bytes_max=20)


def write_options(folder: Path, seaweed: Seaweed) -> Path:
    path = folder / "store.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in seaweed.options().items()))
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_sealed_swarm_of_real_agents_ends_with_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, kind: str,
) -> None:
    """Three processes over a sealed store, a folder or SeaweedFS: nothing that was trained lies there in the clear."""
    seaweed = request.getfixturevalue("seaweed") if kind == "s3" else None
    with start_consortium(tmp_path, {f"site-{i}": None for i in range(3)}, seed=1) as swarm:
        for site in swarm.sites:
            password = (site.folder / "password.txt").read_text().strip()
            create_seal_key(site.folder / "seal-key.json", password, is_cheap=True)
            text = site.toml.read_text()
            text = text.replace('# seal_key = "seal-key.json"', 'seal_key = "seal-key.json"')
            if seaweed is not None:
                write_options(site.folder, seaweed)
                text = text.replace('url = "../store"', 'url = "s3://swarm/sealed"\noptions_file = "store.toml"')
            site.toml.write_text(text)
        if seaweed is not None:
            swarm.store = Store("s3://swarm/sealed", options=seaweed.options())
        spec = RehearsalSpec(name="sealed", widths=(40, 30), limits=Limits(rounds=3, sites_to_start=3))
        run = swarm.propose(spec)
        swarm.start_agents([run])
        events: list[dict[str, Any]] = []
        swarm.follow(lambda _, event: events.append(event), timeout_s=120)
        view = swarm.contract.view_run(run)
        assert view.finalized_round == 3
        assert {e["checkpoint"] for e in events if e["event"] == "ended"} == {view.checkpoint}
        assert not swarm.store.has_blob(view.checkpoint) and swarm.store.has_envelope(view.checkpoint)
        for name in swarm.store.list_blobs():
            assert b'"F32"' not in swarm.store.get_blob(name, bytes_max=1 << 20)
        assert all(len(record.seal_key) == 64 for record in swarm.contract.get_sites())
        password = (swarm.sites[2].folder / "password.txt").read_text().strip()
        key = open_seal_key(swarm.sites[2].folder / "seal-key.json", password)
        member = seal_store(swarm.store, key, swarm.contract, run)
        assert read_checkpoint(member, view.checkpoint, spec)
        said = "".join(path.read_text() for site in swarm.sites for path in (site.log, site.errors))
        assert "sk-admin" not in said and password not in said and key.derive_content_key("x", "y").hex() not in said
        # an auditor, who holds no member's key, with the commands alone
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("SWARMCHAIN_PASSWORD", "of the auditor")
        said = CliRunner().invoke(cli, ["run", "auditor-key", "--out", "auditor-key.json"]).stdout.strip()
        monkeypatch.delenv("SWARMCHAIN_PASSWORD")
        site = ["--site", str(swarm.sites[1].toml)]
        done = CliRunner().invoke(cli, ["run", "disclose", str(run), *site, "--to", said, "--out", "run.keys"])
        assert done.exit_code == 0, done.output
        monkeypatch.setenv("SWARMCHAIN_PASSWORD", "of the auditor")
        verify = ["run", "verify", str(run), *site]
        done = CliRunner().invoke(cli, [*verify, "--keys", "run.keys", "--auditor-key", "auditor-key.json"])
        assert done.exit_code == 0 and "merges recomputed bit for bit" in done.output, done.output
        # a member proves it with its own key; whoever has none is told that the run is sealed
        monkeypatch.delenv("SWARMCHAIN_PASSWORD")
        done = CliRunner().invoke(cli, verify)
        assert done.exit_code == 0 and "merges recomputed bit for bit" in done.output, done.output
        keyless = swarm.sites[1].folder / "keyless.toml"
        keyless.write_text(swarm.sites[1].toml.read_text().replace('seal_key =', '# seal_key ='))
        done = CliRunner().invoke(cli, ["run", "verify", str(run), "--site", str(keyless)])
        assert "is sealed, and its key was not disclosed" in str(done.exception)
        assert "run disclose" in getattr(done.exception, "hint", "")
        # pruning takes envelopes and ciphertexts along
        before = set(swarm.store.list_all())
        prune(swarm.contract, swarm.store, plan_pruning(swarm.contract, swarm.store, keep_rounds=1))
        gone = before - set(swarm.store.list_all())
        assert sum(kind == "sealed" for kind, _ in gone) == 7 and sum(kind == "blobs" for kind, _ in gone) >= 7
        assert read_checkpoint(member, view.checkpoint, spec)
