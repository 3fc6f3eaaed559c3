"""The operator's path: commands of a consortium's day after, on a real chain, a real folder and real files."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import urllib3
from conftest import write_cells
from eth_account import Account
from prometheus_client.parser import text_string_to_metric_families

from swarmchain.agent import Agent
from swarmchain.cli import main
from swarmchain.config import SiteCard, read_site_config
from swarmchain.consortium import Consortium, LocalSite, start_consortium
from swarmchain.describe import FIELDS, UNSPOKEN, compare_specs, describe_duration, describe_spec
from swarmchain.doctor import Finding, compute_exit_code, examine_site
from swarmchain.errors import ConfigError
from swarmchain.health import Monitor, parse_address, serve
from swarmchain.keys import create_keystore, find_password, open_keystore
from swarmchain.merging import Mean
from swarmchain.planning import plan_cell_type, plan_statistics, read_statistics
from swarmchain.protocol import Change, Phase, Terms
from swarmchain.site import open_site
from swarmchain.spec import (
    CellTypeSpec,
    CustomSpec,
    DonorSpec,
    EvaluationSpec,
    Limits,
    Model,
    Panel,
    RehearsalSpec,
    RunRef,
    Spec,
    StatisticsRef,
    StatisticsSpec,
    Tensor,
    Term,
    Training,
    encode_spec,
)
from swarmchain.store import Store, read_spec
from swarmchain.timing import KINDS
from swarmchain.watching import RunWatch

# everything that any command of this file printed; a test at its end searches it
SAID: list[str] = []

STATISTICS = StatisticsSpec(name="sums", panel=Panel(features=tuple(f"gene{i}" for i in range(12))),
                            labels=("type 0", "type 1", "type 2"), limits=Limits(rounds=2, sites_to_start=3,
                                                                                 one_checkpoint=True))
REHEARSAL = RehearsalSpec(name="try", widths=(20, 5), limits=Limits(rounds=2, sites_to_start=3))
TRAINING = CellTypeSpec(name="types", panel=STATISTICS.panel, labels=STATISTICS.labels,
                        limits=Limits(rounds=3, sites_to_start=3), seed_checkpoint="ab" * 32,
                        statistics=StatisticsRef(run=1, spec="cd" * 32, checkpoint="ef" * 32))
REF = RunRef(run=1, spec="cd" * 32, checkpoint="ef" * 32)
SPECS: tuple[Spec, ...] = (
    STATISTICS, TRAINING, REHEARSAL,
    DonorSpec(**{name: getattr(TRAINING, name) for name in ("name", "panel", "labels", "limits", "seed_checkpoint",
                                                            "statistics")}),
    EvaluationSpec(name="how it does", trained=REF, labels=STATISTICS.labels, limits=STATISTICS.limits),
    CustomSpec(name="ours", tensors=(Tensor(name="w", dtype="float32", shape=(3,)),), limits=TRAINING.limits,
               seed_checkpoint="ab" * 32))


def swarmchain(*words: object, folder: Path, code: int = 0) -> str:
    """One command, without a terminal; standard output and error together."""
    said, handlers = io.StringIO(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said),
          pytest.raises(SystemExit) as end):
        main([str(word) for word in words])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    SAID.append(said.getvalue())
    assert end.value.code == code, said.getvalue()
    return said.getvalue()


def read_json(*words: object, folder: Path, code: int = 0) -> Any:
    return json.loads(swarmchain(*words, "--json", folder=folder, code=code))


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    """Three sites with a chain of their own, whose clock no other test moves."""
    folder = tmp_path_factory.mktemp("operator")
    files = {name: write_cells(folder / f"{name}.h5ad", seed=i) for i, name in enumerate(("North", "East", "South"))}
    with start_consortium(folder / "swarm", files, seed=5, label_column="cell_type") as made:
        for site in made.sites:
            (site.folder / "site-card.json").write_text(site.card.model_dump_json())
        yield made


@pytest.fixture
def sites(swarm: Consortium) -> Path:
    """The folder in which North/site.toml and the others lie."""
    return swarm.folder


# -- membership


def test_consortium_changes_by_majority_and_twice_is_once(sites: Path) -> None:
    """Admit a site, rotate its key, remove it; whoever repeats a command is told, and nothing is done twice."""
    address = create_keystore(sites / "d.json", "correct horse", work_log2=4)
    card = SiteCard(name="West", address=address, features=("gene0",), labels=("type 0",))
    (sites / "d-card.json").write_text(card.model_dump_json())
    admit = ("consortium", "propose", "admit", "d-card.json", "--site", "North/site.toml")
    first = read_json(*admit, folder=sites)
    number = first["proposal"]
    assert (first["approvals"], first["needed"], first["state"]) == (["North"], 2, "open")
    again = swarmchain(*admit, folder=sites)
    assert f"proposal {number} is proposed already: admit West ({address}); 1 of 2 approvals (North)" in again
    assert "was approved by this site already" in swarmchain(
        "consortium", "approve", number, "--site", "North/site.toml", folder=sites)
    assert "carried out" in swarmchain("consortium", "approve", number, "--site", "East/site.toml", folder=sites)
    assert "was carried out already" in swarmchain("consortium", "approve", number, "--site", "South/site.toml",
                                                   folder=sites)
    listed = read_json("consortium", "list", "--site", "North/site.toml", folder=sites)
    assert listed["sites"][3] == {"site": 3, "name": "West", "address": address, "active": True}
    said = swarmchain("consortium", "propose", "rotate", "West", "0x" + "12" * 20, "--site", "North/site.toml",
                      folder=sites)
    assert "let West sign as 0x" + "12" * 20 in said and "1 of 3 approvals" in said
    number = read_json("consortium", "propose", "remove", "West", "--site", "North/site.toml", folder=sites)["proposal"]
    for name in ("East", "South"):
        swarmchain("consortium", "approve", number, "--site", f"{name}/site.toml", folder=sites)
    said = swarmchain("consortium", "list", "--site", "North/site.toml", folder=sites)
    assert "West" in said and "not active" in said and "3 active sites" in said


@pytest.mark.parametrize(("words", "said"), [
    (("propose", "remove", "Nowhere"), "no active site is called 'Nowhere'"),
    (("propose", "rotate", "East", "0x12"), "'0x12' is no address"),
    (("propose", "admit", "North/site-card.json"), "is already site 0"),
    (("propose", "retire", "nowhere.json"), "cannot read deployment"),
    (("approve", "99"), "there is no proposal 99"),
])
def test_invalid_change_of_the_consortium(sites: Path, words: tuple[str, ...], said: str) -> None:
    found = swarmchain("consortium", *words, "--site", "North/site.toml", folder=sites, code=1)
    assert said in found
    assert len(found.strip().splitlines()) <= 2


def test_founding_from_the_store_and_twice_is_once(swarm: Consortium, sites: Path, tmp_path: Path) -> None:
    """site init and deploy: the card travels through the store, a person agrees to it, repeating changes nothing."""
    (tmp_path / "password.txt").write_text("correct horse\n")
    init = ("site", "init", "--name", "Alone", "--folder", "alone", "--data", sites.parent / "North.h5ad",
            "--label-column", "cell_type", "--store", "store", "--password-file", "password.txt")
    deploy = ("deploy", "--rpc-url", swarm.chain.rpc_url, "--keystore", "alone/keystore.json", "--password-file",
              "password.txt", "--out", "deployment.json", "--store", "store")
    assert "who founds the consortium?" in swarmchain(*deploy[:-2], folder=tmp_path, code=1)
    made = read_json(*init, folder=tmp_path)
    assert made["told"] == "is set up" and (tmp_path / "alone" / "keystore.json").stat().st_mode & 0o077 == 0
    keystore = (tmp_path / "alone" / "keystore.json").read_bytes()
    assert read_json(*init, folder=tmp_path)["told"] == "is set up already"
    assert "exists already, with other settings" in swarmchain(*init[:3], "Other", *init[4:], folder=tmp_path, code=1)
    assert (tmp_path / "alone" / "keystore.json").read_bytes() == keystore
    refused = swarmchain(*deploy, folder=tmp_path, code=1)
    assert f"{made['address']}  Alone" in refused and "nobody is there to compare" in refused
    found = read_json(*deploy, "--yes", folder=tmp_path)
    assert (found["told"], found["sites"]) == ("deployed", {"Alone": made["address"]})
    assert read_json(*deploy, folder=tmp_path) == {**found, "told": "is deployed already"}
    card = SiteCard(name="Late", address="0x" + "12" * 20, features=("g",), labels=("l",))
    (tmp_path / "store" / "cards" / f"{card.address}.json").write_text(card.model_dump_json())
    assert "names a consortium of Alone" in swarmchain(*deploy, "--yes", folder=tmp_path, code=1)


# -- doctor


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


def work(swarm: Consortium, run: int, events: list[dict[str, Any]] | None = None, *, monitor: Monitor | None = None,
         sites: Sequence[LocalSite] = ()) -> None:
    """Agents (by default all) at work on one run until it is over, as threads: their libraries are loaded already."""
    def one(site: LocalSite) -> None:
        config = read_site_config(site.toml)
        seen = monitor if site is swarm.sites[0] and monitor is not None else Monitor()

        def log(event: dict[str, Any]) -> None:
            seen.take(event)
            if events is not None:
                events.append(event)

        def turn() -> bool:
            seen.turn(head=agent.head, views=agent.get_views(), sent={"up": store.bytes_up, "down": store.bytes_down})
            return False

        with open_site(config, site.signer) as opened:
            store = Store(config.store_url)
            agent = Agent(opened, store, log=log, on_duty=seen.begin)
            agent.run([run], stopping=turn)

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, sites or swarm.sites))


@pytest.fixture(scope="module")
def trained(swarm: Consortium) -> tuple[int, int]:
    """A statistics run that is done, and a training run on it that is proposed."""
    summed = swarm.propose(plan_statistics([s.card for s in swarm.sites], name="sums", sites_to_start=3))
    work(swarm, summed)
    view = swarm.contract.view_run(summed)
    spec, seed = plan_cell_type(
        read_statistics(swarm.store, view), view, name="types", limits=Limits(rounds=2, sites_to_start=3),
        training=Training(steps=8, batch_size=16), sites_per_feature_min=2)
    swarm.store.put_blob(seed)
    digest = swarm.store.put_blob(encode_spec(spec))
    return summed, swarm.contract.propose_run(swarm.sites[0].signer, spec=digest, terms=Terms(600, 600, 2))


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


@breaks("settings", "agent.thread: Extra inputs are not permitted")
def unknown_key(folder: Path, text: str) -> str:
    return text.replace("threads = 1", "threads = 1\nthread = 2")


@breaks("password", "is readable by others (mode 644)")
def open_password(folder: Path, text: str) -> str:
    (folder / "password.txt").chmod(0o644)
    return text


@breaks("key", "wrong password for")
def wrong_password(folder: Path, text: str) -> str:
    (folder / "password.txt").write_text("wrong\n")
    return text


@breaks("key", "is readable by others")
def open_keystore_file(folder: Path, text: str) -> str:
    (folder / "keystore.json").chmod(0o640)
    return text


@breaks("key", "cannot read the keystore")
def no_keystore(folder: Path, text: str) -> str:
    (folder / "keystore.json").unlink()
    return text


@breaks("deployment", "cannot read deployment")
def no_deployment(folder: Path, text: str) -> str:
    return text.replace("deployment.json", "nowhere.json")


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


@breaks("profile", "besu-qbft, but the node is anvil/")
def other_profile(folder: Path, text: str) -> str:
    return text.replace('profile = "auto"', 'profile = "besu-qbft"')


@breaks("membership", "is no site of this consortium")
def stranger(folder: Path, text: str) -> str:
    (folder / "keystore.json").unlink()
    create_keystore(folder / "keystore.json", (folder / "password.txt").read_text().strip(), work_log2=4)
    return text


@breaks("membership", "the contract knows this key as 'North', site.toml says 'Nord'")
def other_name(folder: Path, text: str) -> str:
    return text.replace('name = "North"', 'name = "Nord"')


@breaks("journal", "is readable by others")
def open_journal(folder: Path, text: str) -> str:
    (folder / "work" / "journal.sqlite").chmod(0o644)
    return text


@breaks("journal", "belongs to site 1 of contract")
def other_journal(folder: Path, text: str) -> str:
    shutil.copytree(folder.parent / "East" / "work", folder / "work", dirs_exist_ok=True)
    return text


@breaks("disk", "/proc")
def no_room(folder: Path, text: str) -> str:
    return text.replace('work_dir = "work"', 'work_dir = "/proc/work"')


@breaks("store", "is no folder")
def no_store(folder: Path, text: str) -> str:
    return text.replace("../store", "../stor")


@breaks("data", "does not exist")
def no_data(folder: Path, text: str) -> str:
    return text.replace("North.h5ad", "Nowhere.h5ad")


@breaks("data", "has no column 'celltype'")
def no_column(folder: Path, text: str) -> str:
    return text.replace('label_column = "cell_type"', 'label_column = "celltype"')


@breaks("data", "renames 'type 9', which no cell has")
def stray_label(folder: Path, text: str) -> str:
    return text.replace("[data.label_map]", '[data.label_map]\n"type 9" = "type 0"')


@breaks("run", "label 'Type zero' is not on the run's list")
def unknown_label(folder: Path, text: str) -> str:
    return text.replace("[data.label_map]", '[data.label_map]\n"type 0" = "Type zero"')


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


# -- consent, and watching


def test_join_shows_the_spec_and_needs_consent(swarm: Consortium, trained: tuple[int, int], sites: Path) -> None:
    run, site = trained[1], ("--site", "South/site.toml")
    said = swarmchain("run", "join", run, *site, folder=sites, code=1)
    for words in ("leaves the site", "changes of the network's", "12 features", "proposed by",
                  "North", "stands on", "the statistics of run", "nobody is there to consent", "add --yes"):
        assert words in said, words
    assert 2 not in swarm.contract.view_run(run).joined
    shown = swarmchain("run", "show", run, *site, folder=sites)
    assert shown.strip() in said
    told = read_json("run", "show", run, *site, "--like", trained[0], folder=sites)["words"]
    assert {"what": f"unlike run {trained[0]}", "words": "task: statistics → cell_type"} in told
    assert f"South joined run {run}" in swarmchain("run", "join", run, *site, "--yes", folder=sites)
    assert f"South has joined run {run} already" in swarmchain("run", "join", run, *site, folder=sites)
    assert read_json("run", "join", run, *site, folder=sites)["told"] == "joined already"
    assert f"South left run {run}" in swarmchain("run", "leave", run, *site, folder=sites)
    assert f"South is not in run {run}" in swarmchain("run", "stop", run, *site, folder=sites)


def test_stop_waits_for_the_end_of_the_round(swarm: Consortium, sites: Path) -> None:
    alone = REHEARSAL.model_copy(update={"name": "alone", "limits": Limits(rounds=9, sites_to_start=1)})
    contract, signer = swarm.contract, swarm.sites[2].signer
    run = contract.propose_run(signer, spec=swarm.store.put_blob(encode_spec(alone)), terms=Terms(2, 2, 1))
    contract.join_run(signer, run)
    contract.open_round(signer, run)
    said = swarmchain("run", "stop", run, "--site", "South/site.toml", folder=sites)
    assert f"run {run}: waits for the end of round 1\nSouth left run {run}" in said
    view = contract.view_run(run)
    assert view.phase is Phase.CLOSED and not view.joined


def test_proposing_twice_is_once_and_differences_are_told(swarm: Consortium, trained: tuple[int, int], sites: Path
                                                          ) -> None:
    spec = read_spec(swarm.store, swarm.contract.view_run(trained[1]).spec)
    other = spec.model_copy(update={"name": "more steps", "training": Training(steps=9, batch_size=16)})
    write_spec(sites / "other.json", other)
    words = ("run", "propose", "--site", "East/site.toml", "--spec", "other.json", "--like", trained[1])
    first = read_json(*words, folder=sites)
    assert first["told"] == "proposed" and {d["field"]: d["words"] for d in first["differences"]} == {
        "name": "types → more steps", "training.steps": "8 → 9"}
    again = swarmchain(*words, folder=sites)
    assert f"run {first['run']} is proposed already" in again
    assert f"unlike run {trained[1]}  training.steps: 8 → 9" in again


def test_study_from_cards_in_the_store(swarm: Consortium, sites: Path) -> None:
    """run start plans, proposes and joins; a card that is not the site's is refused."""
    for site in swarm.sites:
        swarmchain("site", "card", "--site", f"{site.name}/site.toml", folder=sites)
    start = ("run", "start", "statistics", "--site", "North/site.toml", "--name", "from cards")
    assert "nobody is there to consent" in swarmchain(*start, folder=sites, code=1)
    found = read_json(*start, "--yes", folder=sites)
    assert found["told"] == "joined" and found["proposed"] is False  # the first try proposed it
    again = read_json(*start, "--yes", folder=sites)
    assert (again["run"], again["told"]) == (found["run"], "joined already")
    path = sites / "store" / "cards" / f"{swarm.sites[1].signer.address.lower()}.json"
    good = path.read_bytes()
    for bad, words in ((swarm.sites[2].card.model_dump_json().encode(), "is that of South"), (b"{}", "is none"),
                       (None, "holds no card of East")):
        path.unlink() if bad is None else path.write_bytes(bad)
        assert words in swarmchain(*start, folder=sites, code=1)
    path.write_bytes(good)


def test_watch_tells_each_change_and_ends_with_the_run(swarm: Consortium, sites: Path) -> None:
    run = swarm.propose(REHEARSAL.model_copy(update={"name": "watched"}))
    before = swarmchain("run", "watch", run, "--site", "North/site.toml", "--once", folder=sites)
    assert f"run {run}  waits for sites: North, East, South joined" in before
    watched = RunWatch(swarm.contract, swarm.store, run)
    watched.look()
    work(swarm, run)
    end = watched.look()
    assert (end.round, end.phase, end.missing, end.is_over, end.rounds) == (2, "CLOSED", (), True, 2)
    assert end.committed == end.voted == ("North", "East", "South") and end.gas > 200_000
    said = swarmchain("run", "watch", run, "--site", "North/site.toml", "--json", folder=sites).splitlines()
    assert len(said) == 1 and json.loads(said[0])["checkpoint"] == swarm.contract.view_run(run).checkpoint
    assert "over; checkpoint " in swarmchain("run", "watch", run, "--site", "North/site.toml", folder=sites)
    assert "there is no run 999" in swarmchain("run", "watch", 999, "--site", "North/site.toml", folder=sites, code=1)


# -- health and metrics


def ask(port: int, path: str) -> tuple[int, str]:
    answer = urllib3.PoolManager().request("GET", f"http://127.0.0.1:{port}{path}", retries=False)
    return answer.status, answer.data.decode()


def test_metrics_of_an_agent_at_work(swarm: Consortium, sites: Path) -> None:
    """Three agents, one of them watched over HTTP while it works and after."""
    run = swarm.propose(REHEARSAL)
    monitor, events = Monitor(), []
    with serve(monitor, "127.0.0.1:0") as (host, port):
        work(swarm, run, events, monitor=monitor)
        assert (host, ask(port, "/healthz")[0]) == ("127.0.0.1", 200)
        status, text = ask(port, "/metrics")
        assert ask(port, "/elsewhere")[0] == 404
    values = {family.name: family for family in text_string_to_metric_families(text)}
    rounds = {s.labels["outcome"]: s.value for s in values["swarmchain_rounds"].samples if s.name.endswith("_total")}
    assert status == 200 and rounds == {"finalized": 2.0, "rejected": 0.0, "expired": 0.0}
    assert {s.labels["kind"] for s in values["swarmchain_work_seconds"].samples} == {*KINDS, "wait"}
    assert sum(s.value for s in values["swarmchain_store_bytes"].samples if s.name.endswith("_total")) > 0
    assert "cell" not in text and "samples" not in text


def test_agent_joins_listens_and_works(swarm: Consortium, sites: Path) -> None:
    """The command as the guide has it: consent, then work; the port that it chose is an event."""
    spec = REHEARSAL.model_copy(update={"name": "by command"})
    contract, digest = swarm.contract, swarm.store.put_blob(encode_spec(spec))
    run = contract.propose_run(swarm.sites[0].signer, spec=digest, terms=Terms(60, 60, 2))
    for site in swarm.sites[1:]:
        contract.join_run(site.signer, run)
    command = ("agent", "--site", "North/site.toml", "--run", run, "--join", run, "--metrics", ":0", "--json")
    assert "nobody is there to consent" in swarmchain(*command, folder=sites, code=1)
    with ThreadPoolExecutor() as pool:
        others = pool.submit(work, swarm, run, sites=swarm.sites[1:])
        events = [json.loads(line) for line in swarmchain(*command, "--yes", folder=sites).splitlines()]
        others.result()
    assert [event["event"] for event in events[:2]] == ["listening", "started"] and events[0]["port"] > 0
    assert events[-1]["event"] == "ended" and events[-1]["rounds"]["finalized"] == 2
    wrong = sites / "North" / "wrong.toml"
    text = (sites / "North" / "site.toml").read_text()
    wrong.write_text(text.replace('# metrics = "127.0.0.1:9464"', 'metrics = "here"'))
    assert "is no host:port" in swarmchain("agent", "--site", "North/wrong.toml", folder=sites, code=1)


def test_health_tells_stuck_from_waiting_and_from_training() -> None:
    seconds = [0.0]
    monitor = Monitor(clock=lambda: seconds[0])
    monitor.turn(head=1, views=[], sent={})
    assert monitor.judge()[0]
    monitor.begin("contribute", 5_400)
    seconds[0] = 5_000
    assert monitor.judge()[0] and monitor.judge()[1]["duty"] == "contribute"
    monitor.turn(head=1, views=[], sent={})
    seconds[0] = 5_200
    assert monitor.judge()[1]["state"] == "stuck"
    monitor.turn(head=2, views=[], sent={})
    monitor.take({"event": "unreachable", "reason": "no Ethereum node answers"})
    is_well, told = monitor.judge()
    assert not is_well and (told["state"], told["reason"]) == ("waiting", "no Ethereum node answers")
    seconds[0] += 46
    assert monitor.judge()[0]


@pytest.mark.parametrize("text", ["9464", "host:", "127.0.0.1:70000", "http://127.0.0.1:1", "a:b"])
def test_invalid_metrics_address(text: str) -> None:
    with pytest.raises(ConfigError, match="is no host:port"):
        parse_address(text)


def test_invalid_metrics_port_that_is_taken() -> None:
    with serve(Monitor(), ":0") as (_, port), pytest.raises(ConfigError, match="cannot listen"):
        serve(Monitor(), f":{port}").__enter__()


# -- a spec in words


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.task)
def test_spec_in_words_leaves_no_field_out(spec: Any) -> None:
    assert set(type(spec).model_fields) - UNSPOKEN <= set(FIELDS)
    lines = describe_spec(spec)
    words = dict(lines)
    assert len(words) == len(lines) == len(set(type(spec).model_fields) - UNSPOKEN) + 2
    assert spec.name in words["task"] and words["leaves the site"]


def test_every_task_is_put_in_words() -> None:
    assert {type(spec) for spec in SPECS} == set(get_args(Spec))
    ontology = {"type 0": Term(id="CL:0000084", parent="type 1")}
    words = dict(describe_spec(STATISTICS.model_copy(update={"ontology": ontology})))
    assert words["ontology"] == "1 terms: type 0 is CL:0000084 (of type 1)"
    untrusting = TRAINING.model_copy(update={"merge": Mean(trust=None)})
    for spec, is_rated in ((TRAINING, True), (untrusting, False)):
        assert ("contribution does to the loss" in dict(describe_spec(spec))["leaves the site"]) == is_rated


def test_field_without_words_is_shown_as_it_stands() -> None:
    class Newer(RehearsalSpec):
        surprise: dict[str, int] = {"leak": 1}

    lines = dict(describe_spec(Newer(name="n", widths=(3, 2), limits=Limits(rounds=1, sites_to_start=1))))
    assert lines["surprise"] == '{"leak": 1}'


def test_specs_compared_in_words() -> None:
    other = TRAINING.model_copy(update={
        "panel": Panel(features=(*TRAINING.panel.features[1:], "gene99")), "model": Model(hidden=(64, 32)),
        "merge": Mean()})
    found = dict(compare_specs(TRAINING, other))
    assert found["panel.features"] == "12 → 12: without gene0, with gene99"
    assert found["model.hidden"] == "[128] → [64, 32]"
    assert found["merge.method"] == "clipped_mean → mean"
    assert found["merge.clip_factor"] == "1.0 → not there"
    assert compare_specs(TRAINING, TRAINING) == []


@pytest.mark.parametrize(("seconds", "words"), [(0, "0 s"), (61, "1 min 1 s"), (3600, "1 h"), (90_061, "1 d 1 h")])
def test_duration_in_words(seconds: int, words: str) -> None:
    assert describe_duration(seconds) == words


# -- nothing secret is said


def test_no_output_shows_a_secret(swarm: Consortium, trained: tuple[int, int], sites: Path) -> None:
    """Whatever the commands of this file printed, refusals among them: no password, no key, no nonce."""
    for words in (("site", "doctor"), ("site", "doctor", "--json"), ("status",), ("consortium", "list"),
                  ("run", "list"), ("run", "watch", trained[0], "--once"), ("run", "watch", trained[0], "--json")):
        swarmchain(*words, "--site", "North/site.toml", folder=sites)
    text = "\n".join(SAID).lower()
    for site in swarm.sites:
        password = (site.folder / "password.txt").read_text().strip()
        secret = Account.decrypt((site.folder / "keystore.json").read_text(), password)
        with contextlib.closing(sqlite3.connect(site.folder / "work" / "journal.sqlite")) as journal:
            nonces = [row[0] for row in journal.execute("select nonce from contribution")]
        assert nonces and len(text) > 2_000
        for hidden in (password, secret.hex().removeprefix("0x"), *nonces):
            assert hidden.lower() not in text


def write_spec(path: Path, spec: Any) -> Path:
    path.write_bytes(encode_spec(spec))
    return path
