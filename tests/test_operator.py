"""The operator's path: commands of a consortium's day after, on a real chain, a real folder and real files."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import urllib3
from desk import REHEARSAL, SAID, STATISTICS, TRAINING, read_json, start_swarm, swarmchain, train, work, write_spec
from eth_account import Account
from prometheus_client.parser import text_string_to_metric_families

from swarmchain.config import SiteCard
from swarmchain.consortium import Consortium
from swarmchain.describe import FIELDS, UNSPOKEN, compare_specs, describe_duration, describe_spec
from swarmchain.errors import ConfigError
from swarmchain.health import Monitor, parse_address, serve
from swarmchain.keys import create_keystore
from swarmchain.merging import Mean
from swarmchain.protocol import Phase, Terms
from swarmchain.spec import (
    CustomSpec,
    DonorSpec,
    EvaluationSpec,
    Limits,
    Model,
    Panel,
    RehearsalSpec,
    RunRef,
    Spec,
    Tensor,
    Term,
    Training,
    encode_spec,
)
from swarmchain.store import read_spec
from swarmchain.timing import KINDS
from swarmchain.watching import RunWatch

REF = RunRef(run=1, spec="cd" * 32, checkpoint="ef" * 32)
SPECS: tuple[Spec, ...] = (
    STATISTICS, TRAINING, REHEARSAL,
    DonorSpec(**{name: getattr(TRAINING, name) for name in ("name", "panel", "labels", "limits", "seed_checkpoint",
                                                            "statistics")}),
    EvaluationSpec(name="how it does", trained=REF, labels=STATISTICS.labels, limits=STATISTICS.limits),
    CustomSpec(name="ours", tensors=(Tensor(name="w", dtype="float32", shape=(3,)),), limits=TRAINING.limits,
               seed_checkpoint="ab" * 32))


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


def answer(text: str, *words: object, folder: Path) -> tuple[int, str]:
    """A command at a terminal at which somebody types `text`."""
    master, slave = os.openpty()
    try:
        os.write(master, text.encode() + b"\n")
        done = subprocess.run([sys.executable, "-m", "swarmchain", *map(str, words)], cwd=folder, stdin=slave,
                              capture_output=True, text=True, timeout=120)
    finally:
        os.close(master)
        os.close(slave)
    return done.returncode, done.stdout + done.stderr


def test_consent_is_asked_for_at_a_terminal(swarm: Consortium, sites: Path) -> None:
    digest = swarm.store.put_blob(encode_spec(REHEARSAL.model_copy(update={"name": "asked"})))
    run = swarm.contract.propose_run(swarm.sites[0].signer, spec=digest, terms=Terms(60, 60, 2))
    join = ("run", "join", run, "--site", "East/site.toml")
    code, said = answer("n", *join, folder=sites)
    assert code == 1 and f"Does East consent to run {run}?" in said and "no consent was given" in said
    code, said = answer("y", *join, folder=sites)
    assert code == 0 and f"East joined run {run}" in said


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
