"""`site doctor` names what is broken, each thing by its line, before an agent would trip over it."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from desk import REHEARSAL, SAID, read_json, start_swarm, swarmchain, train

from swarmchain.consortium import Consortium
from swarmchain.doctor import compute_exit_code, examine_site
from swarmchain.fitness import Finding
from swarmchain.keys import create_keystore, find_password, open_keystore
from swarmchain.protocol import Change, Terms
from swarmchain.spec import (
    Training,
    encode_spec,
)
from swarmchain.store import read_spec


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    with start_swarm(tmp_path_factory.mktemp("operator")) as made:
        yield made


@pytest.fixture
def sites(swarm: Consortium) -> Path:
    """The folder in which North/site.toml and the others lie."""
    return swarm.folder


@pytest.fixture(scope="module")
def trained(swarm: Consortium) -> tuple[int, int]:
    return train(swarm)


def examine(toml: Path, **options: Any) -> dict[str, list[Finding]]:
    """Every finding by its check."""
    found: dict[str, list[Finding]] = {}
    for item in examine_site(toml, unlock=lambda c: open_keystore(c.resolve(c.keys.keystore), find_password(c) or ""),
                             **options):
        assert "\n" not in item.words + item.remedy
        assert item.remedy or item.status != "failed", item
        found.setdefault(item.check, []).append(item)
        SAID.append(item.words + item.remedy)
    return found


def test_doctor_finds_a_sound_site_well(swarm: Consortium, trained: tuple[int, int], sites: Path) -> None:
    said = swarmchain("site", "doctor", "--site", "North/site.toml", "--run", trained[1], folder=sites)
    marks = {line.split(" ", 1)[0] for line in said.splitlines()}
    assert marks == {"✓"}, said
    for words in ("settings: ", "key: opens; signs as 0x", "contract: this version's code", "membership: site 0",
                  "readable by its owner only", "features, 3 labels", "not joined yet", " ms a step, 8 steps"):
        assert words in said, words
    found = read_json("site", "doctor", "--site", "North/site.toml", folder=sites)
    assert found["exit_code"] == 0 and {f["status"] for f in found["findings"]} == {"ok"}


BROKEN: dict[str, tuple[Callable[[Path, str], str], str, str]] = {}


def breaks(check: str, words: str) -> Callable[[Any], Any]:
    """Register how to break one thing in a copy of a site: folder and text of site.toml → its new text."""
    def register(function: Callable[[Path, str], str]) -> Callable[[Path, str], str]:
        BROKEN[function.__name__] = (function, check, words)
        return function
    return register


@breaks("password", "is readable by others (mode 644)")
def open_password(folder: Path, text: str) -> str:
    (folder / "password.txt").chmod(0o644)
    return text


@breaks("key", "wrong password for")
def wrong_password(folder: Path, text: str) -> str:
    (folder / "password.txt").write_text("wrong\n")
    return text


@breaks("settings", "rpc_urls holds a password, and ")
def open_settings(folder: Path, text: str) -> str:
    return re.sub(r'rpc_urls = \["http://', 'rpc_urls = ["http://me:secret@', text)


@breaks("key", "is readable by others")
def open_keystore_file(folder: Path, text: str) -> str:
    (folder / "keystore.json").chmod(0o640)
    return text


@breaks("key", "cannot read the keystore")
def no_keystore(folder: Path, text: str) -> str:
    (folder / "keystore.json").unlink()
    return text


@breaks("contract", "no code lies at 0x")
def other_contract(folder: Path, text: str) -> str:
    found = json.loads((folder.parent / "deployment.json").read_text())
    (folder / "other.json").write_text(json.dumps({**found, "contract": "0x" + "12" * 20}))
    return text.replace("../deployment.json", "other.json")


@breaks("contract", "the node is on chain 31337, the deployment on 1337")
def other_chain(folder: Path, text: str) -> str:
    found = json.loads((folder.parent / "deployment.json").read_text())
    (folder / "other.json").write_text(json.dumps({**found, "chain_id": 1337}))
    return text.replace("../deployment.json", "other.json")


@breaks("membership", "is no site of this consortium")
def stranger(folder: Path, text: str) -> str:
    (folder / "keystore.json").unlink()
    create_keystore(folder / "keystore.json", (folder / "password.txt").read_text().strip(), work_log2=4)
    return text


@breaks("journal", "is readable by others")
def open_journal(folder: Path, text: str) -> str:
    (folder / "work" / "journal.sqlite").chmod(0o644)
    return text


@breaks("journal", "belongs to site 1 of contract")
def other_journal(folder: Path, text: str) -> str:
    shutil.copytree(folder.parent / "East" / "work", folder / "work", dirs_exist_ok=True)
    return text


# what one replaced word in site.toml breaks: the check that says so, its words, before, after
REPLACED = {
    "unknown_key": ("settings", "agent.thread: Extra inputs are not permitted",
                    "threads = 1", "threads = 1\nthread = 2"),
    "no_deployment": ("deployment", "cannot read deployment", "deployment.json", "nowhere.json"),
    "other_profile": ("profile", "besu-qbft, but the node is anvil/", 'profile = "auto"', 'profile = "besu-qbft"'),
    "other_name": ("membership", "the contract knows this key as 'North', site.toml says 'Nord'",
                   'name = "North"', 'name = "Nord"'),
    "no_room": ("disk", "/proc", 'work_dir = "work"', 'work_dir = "/proc/work"'),
    "no_store": ("store", "is no folder", "../store", "../stor"),
    "no_data": ("data", "does not exist", "North.h5ad", "Nowhere.h5ad"),
    "no_column": ("data", "has no column 'celltype'", 'label_column = "cell_type"', 'label_column = "celltype"'),
    "stray_label": ("data", "renames 'type 9', which no cell has",
                    "[data.label_map]", '[data.label_map]\n"type 9" = "type 0"'),
    "unknown_label": ("run", "label 'Type zero' is not on the run's list",
                      "[data.label_map]", '[data.label_map]\n"type 0" = "Type zero"'),
}


def replace_words(old: str, new: str) -> Callable[[Path, str], str]:
    return lambda folder, text: text.replace(old, new)


BROKEN |= {name: (replace_words(old, new), check, words) for name, (check, words, old, new) in REPLACED.items()}


@pytest.mark.parametrize("name", BROKEN)
def test_doctor_names_what_is_broken(swarm: Consortium, trained: tuple[int, int], sites: Path, name: str) -> None:
    breaking, check, words = BROKEN[name]
    folder = sites / f"broken-{name}"
    shutil.copytree(sites / "North", folder)
    (folder / "site.toml").write_text(breaking(folder, (folder / "site.toml").read_text()))
    found = examine(folder / "site.toml", run=trained[1])
    told = [f for f in found[f"run {trained[1]}" if check == "run" else check] if f.status in ("failed", "warning")]
    assert told and words in told[0].words, found
    assert compute_exit_code([f for each in found.values() for f in each]) == (told[0].status == "failed")


def test_doctor_without_a_node_leaves_with_3(sites: Path, unused_port: int) -> None:
    text = (sites / "North" / "site.toml").read_text()
    gone = re.sub(r"rpc_urls = .*", f'rpc_urls = ["http://127.0.0.1:{unused_port}"]', text)
    (sites / "North" / "away.toml").write_text(gone)
    said = swarmchain("site", "doctor", "--site", "North/away.toml", folder=sites, code=3)
    assert f"✗ nodes: no Ethereum node answers at http://127.0.0.1:{unused_port}" in said
    assert "– membership: not looked at: contract comes first" in said


def test_doctor_with_one_of_two_nodes_warns(sites: Path, unused_port: int) -> None:
    text = (sites / "North" / "site.toml").read_text()
    more = text.replace('rpc_urls = [', f'rpc_urls = ["http://me:secret@127.0.0.1:{unused_port}", ')
    (sites / "North" / "two.toml").write_text(more)
    found = examine(sites / "North" / "two.toml")
    assert [f.status for f in found["nodes"]] == ["warning", "ok"]
    assert "secret" not in str(found)


def test_doctor_sees_clock_and_standstill(sites: Path) -> None:
    late = examine(sites / "North" / "site.toml", now=lambda: time.time() + 7_200)["clock"][0]
    assert late.status == "warning" and re.match(r"this machine is 2 h.* ahead of the chain; deadlines", late.words)
    text = (sites / "North" / "site.toml").read_text().replace('profile = "auto"', 'profile = "besu-qbft"')
    (sites / "North" / "besu.toml").write_text(text)
    stale = examine(sites / "North" / "besu.toml", now=lambda: time.time() + 7_200)["clock"][0]
    assert stale.status == "failed" and stale.words.startswith("the newest block is 2 h")


def test_doctor_sees_that_a_run_is_too_large_or_too_slow(swarm: Consortium, trained: tuple[int, int], sites: Path
                                                         ) -> None:
    huge = REHEARSAL.model_copy(update={"widths": (200_000,) * 4})
    contract, signer = swarm.contract, swarm.sites[0].signer
    run = contract.propose_run(signer, spec=swarm.store.put_blob(encode_spec(huge)), terms=Terms(600, 600, 2))
    found = examine(sites / "North" / "site.toml", run=run)
    assert found[f"run {run} memory"][0].status == "failed"
    spec = read_spec(swarm.store, contract.view_run(trained[1]).spec)
    slow = spec.model_copy(update={"training": Training(steps=1_000_000, batch_size=64)})
    run = contract.propose_run(signer, spec=swarm.store.put_blob(encode_spec(slow)), terms=Terms(2, 600, 2))
    found = examine(sites / "North" / "site.toml", run=run)
    late = found[f"run {run} time"][0]
    assert late.status == "failed" and "1000000 steps: " in late.words and "of the 2 s that a round waits" in late.words


def test_doctor_sees_a_pending_removal(swarm: Consortium, sites: Path) -> None:
    contract = swarm.contract
    contract.propose_change(swarm.sites[2].signer, Change.REMOVE, subject=swarm.sites[1].signer.address)
    nonces = [contract.node.get_nonce(s.signer.address) for s in swarm.sites]
    found = examine(sites / "East" / "site.toml")["membership"]
    assert [f.status for f in found] == ["ok", "warning"] and "remove this site" in found[1].words
    assert nonces == [contract.node.get_nonce(s.signer.address) for s in swarm.sites]


