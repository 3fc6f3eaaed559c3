"""The rooms together: real processes, a real chain, a real folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import psutil
import pytest
from conftest import ROOT, write_cells
from desk import swarmchain

from swarmchain.devchain import Devchain, wait_until_gone
from swarmchain.protocol import compute_digest
from swarmchain.spec import Limits, Panel, RehearsalSpec, StatisticsSpec, encode_spec


@pytest.fixture(autouse=True, scope="module")
def password() -> Iterator[None]:
    """The password of all keys of this file, for commands in this process and in others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWARMCHAIN_PASSWORD", "correct horse")
        yield


def run_process(*words: object, folder: Path) -> None:
    """One command as a process of its own, as a user has it."""
    done = subprocess.run([sys.executable, "-m", "swarmchain", *map(str, words)], cwd=folder, capture_output=True,
                          text=True, timeout=240, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def consortium(anvil: Devchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sites by hand, as docs/consortium.md tells: site init, deploy."""
    folder = tmp_path_factory.mktemp("consortium")
    cards = []
    for i, name in enumerate(("a", "b", "c")):
        write_cells(folder / f"{name}.h5ad", seed=i)
        swarmchain("site", "init", "--name", f"Site {name}", "--folder", name, "--data", f"{name}.h5ad",
                   "--label-column", "cell_type", "--store", "store", "--rpc-url", anvil.rpc_url, folder=folder)
        cards += ["--site", f"{name}/site-card.json"]
    swarmchain("deploy", "--rpc-url", anvil.rpc_url, "--keystore", "a/keystore.json", *cards, folder=folder)
    assert (folder / "deployments" / "31337.json").is_file()
    return folder


def train(folder: Path, run: int) -> list[str]:
    """Three agents as three processes; what each says it holds at the end."""
    for name in "abc":
        swarmchain("run", "join", run, "--site", f"{name}/site.toml", "--yes", folder=folder)
    command = [sys.executable, "-m", "swarmchain", "agent", "--json", "--run", str(run), "--site"]
    processes = [
        subprocess.Popen([*command, f"{name}/site.toml"], cwd=folder, stdout=subprocess.PIPE, text=True)
        for name in "abc"
    ]
    held = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0
            ended = [json.loads(line) for line in output.splitlines() if '"ended"' in line]
            held.append(ended[0]["checkpoint"])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return held


def test_consortium_by_hand(consortium: Path) -> None:
    cards = [part for name in "abc" for part in ("--card", f"{name}/site-card.json")]
    swarmchain("run", "new", "statistics", *cards, "--out", "statistics.json", folder=consortium)
    site = ("--site", "a/site.toml")
    said = swarmchain("run", "propose", *site, "--spec", "statistics.json", "--json", folder=consortium)
    first = json.loads(said)["run"]
    assert len(set(train(consortium, first))) == 1
    found = json.loads(swarmchain("run", "statistics", first, *site, "--features-at", 3, "--json", folder=consortium))
    assert found["in_all"] == {"cells": 234, "donors": 0, "sites": 3}
    assert found["labels"]["type 0"] == {"cells": 78, "donors": 0, "sites": 3}
    assert found["features_at"] == {"1": 12, "2": 12, "3": 12}
    said = swarmchain("run", "statistics", first, *site, folder=consortium)
    assert f"{found['highly_variable']} highly variable (seurat) among those at 2 or more sites" in said

    swarmchain("run", "new", "cell-type", *site, "--statistics", first, "--rounds", 3, "--hvg", 8, "--out",
               "training.json", folder=consortium)
    assert 8 <= len(json.loads((consortium / "training.json").read_text())["panel"]["features"]) < 12
    forged = json.loads((consortium / "training.json").read_text())
    forged["statistics"]["checkpoint"] = "ab" * 32
    (consortium / "forged.json").write_text(json.dumps(forged))
    said = swarmchain("run", "propose", *site, "--spec", "forged.json", "--json", folder=consortium)
    said = swarmchain("run", "join", json.loads(said)["run"], "--site", "b/site.toml", folder=consortium, code=1)
    assert "has not the checkpoint abababababab… on chain" in said

    said = swarmchain("run", "propose", *site, "--spec", "training.json", "--json", folder=consortium)
    second = json.loads(said)["run"]
    held = train(consortium, second)
    assert len(set(held)) == 1

    for name in "abc":
        swarmchain("run", "export", second, "--site", f"{name}/site.toml", "--out", f"out-{name}", folder=consortium)
        model = (consortium / f"out-{name}" / "model.safetensors").read_bytes()
        assert compute_digest(model) == held[0]
    listed = json.loads(swarmchain("run", "list", *site, "--json", folder=consortium))
    assert [listed[run - 1]["task"] for run in (first, second)] == ["statistics", "cell_type"]
    status = json.loads(swarmchain("status", *site, "--json", folder=consortium))
    assert status["runs"][second - 1]["checkpoint"] == held[0]
    assert status["client"].startswith("anvil/")


def test_rehearsal_by_hand_and_one_agent_per_key(consortium: Path) -> None:
    """A run without cells; while an agent is at work, its key is taken, and status tells what it needs."""
    swarmchain("run", "new", "rehearsal", "--sites", 3, "--rounds", 2, "--width", 20, "--width", 5, "--out",
               "rehearsal.json", folder=consortium)
    site = ("--site", "a/site.toml")
    said = swarmchain("run", "propose", *site, "--spec", "rehearsal.json", "--json", folder=consortium)
    run = json.loads(said)["run"]
    swarmchain("run", "join", run, *site, "--yes", folder=consortium)
    agent = subprocess.Popen([sys.executable, "-m", "swarmchain", "agent", *site, "--run", str(run)], cwd=consortium,
                             stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert agent.stdout is not None
        assert "at work; anvil/" in agent.stdout.readline()
        said = swarmchain("agent", *site, "--run", run, folder=consortium, code=1)
        assert "another agent is at work with the key" in said
        for name in "bc":
            swarmchain("run", "join", run, "--site", f"{name}/site.toml", "--yes", folder=consortium)
        with contextlib.ExitStack() as stack:
            others = [stack.enter_context(subprocess.Popen(
                [sys.executable, "-m", "swarmchain", "agent", "--site", f"{name}/site.toml", "--run", str(run)],
                cwd=consortium, stdout=subprocess.PIPE, text=True)) for name in "bc"]
            ends = [process.communicate(timeout=120)[0].splitlines()[-1] for process in (agent, *others)]
        assert [process.returncode for process in (agent, *others)] == [0, 0, 0]
    finally:
        agent.kill()
        agent.wait()
    assert len({end.rsplit(" ", 1)[1] for end in ends}) == 1
    assert all("ended: done after round 2; rounds: 2 finalized, 0 rejected, 0 expired" in e for e in ends)
    training = json.loads(swarmchain("status", *site, "--json", folder=consortium))["runs"][run - 1]["training"]
    assert training["window_s"] == 3600 and not training["is_too_slow"]
    journal = consortium / "a" / "work" / "journal.sqlite"
    with contextlib.closing(sqlite3.connect(journal)) as db:
        db.execute("update pace set train_s = 9000 where run = ?", (run,))
        db.commit()
    assert "Site a cannot make the window: training takes 9000 s" in swarmchain("status", *site, folder=consortium)


def test_run_that_fails_says_so_with_its_exit_code(consortium: Path, anvil: Devchain) -> None:
    """Two of three sites stay away: the rounds expire, the run rests, the agent ends with 4 and the tally."""
    spec = RehearsalSpec(name="lonely", widths=(4, 2), limits=Limits(rounds=9, sites_to_start=1, failures_max=2))
    (consortium / "lonely.json").write_bytes(encode_spec(spec))
    said = swarmchain("run", "propose", "--site", "a/site.toml", "--spec", "lonely.json", "--json",
                      "--commit-window", 1, folder=consortium)
    run = json.loads(said)["run"]
    for name in "ab":
        swarmchain("run", "join", run, "--site", f"{name}/site.toml", "--yes", folder=consortium)
    said = swarmchain("agent", "--site", "a/site.toml", "--run", run, folder=consortium, code=4)
    assert f"Error: run {run} ended without reaching its goal, 2 failures in a row: 0 rounds finalized, 0 rejected, " \
        "2 expired" in said


@pytest.mark.parametrize(("old", "new", "words"), [
    ('"../a.h5ad"', '"../nowhere.h5ad"', "data.path: "), ('"keystore.json"', '"key.json"', "keys.keystore: "),
    ('"../deployments/31337.json"', '"../d.json"', "chain.deployment: "), ('"../store"', '"../stor"', "store.url: "),
    ("poll_s = 0.5", 'poll_s = "0.5"', "agent.poll_s: Input should be a valid number"),
    ("threads = 1", "threads = 1\nthread = 2", "agent.thread: Extra inputs are not permitted"),
    ('profile = "auto"', 'profile = "geth"', "chain.profile: Input should be 'auto'"),
])
def test_invalid_site_toml_stops_the_agent(consortium: Path, old: str, new: str, words: str) -> None:
    text = (consortium / "a" / "site.toml").read_text()
    assert old in text
    (consortium / "a" / "wrong.toml").write_text(text.replace(old, new))
    said = swarmchain("agent", "--site", "a/wrong.toml", folder=consortium, code=1)
    assert words in said
    assert len(said.strip().splitlines()) == 2


def test_invalid_keystore_password(consortium: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMCHAIN_PASSWORD", "wrong")
    said = swarmchain("agent", "--site", "a/site.toml", folder=consortium, code=1)
    assert "password" in said and "keystore.json" in said


def test_invalid_rpc_that_nobody_answers(consortium: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMCHAIN_RPC_URL", f"http://127.0.0.1:{unused_port}")
    said = swarmchain("status", "--site", "a/site.toml", folder=consortium, code=3)
    assert f"no Ethereum node answers at http://127.0.0.1:{unused_port}" in said


def test_invalid_label_column(consortium: Path) -> None:
    said = swarmchain("site", "init", "--name", "X", "--folder", "x", "--data", "a.h5ad", "--label-column", "nope",
                      "--store", "store", folder=consortium, code=1)
    assert "no column 'nope'" in said and not (consortium / "x").exists()


def test_invalid_site_that_exists(consortium: Path) -> None:
    said = swarmchain("site", "init", "--name", "X", "--folder", "a", "--data", "a.h5ad", "--label-column",
                      "cell_type", "--store", "store", folder=consortium, code=1)
    assert "exists already" in said


@pytest.mark.parametrize(("change", "words"), [
    ({"nan": True}, "X holds NaN or infinity"),
    ({"label": "Unheard-of"}, "label 'Unheard-of' is not on the run's list"),
    ({"features": 5}, "holds 5 of the panel's 12 features (42%), the run needs 50%"),
    ({"cells": 0}, "holds no cells"),
    ({"missing": True}, "bad.h5ad does not exist"),
])
def test_invalid_data_when_joining(consortium: Path, change: dict[str, Any], words: str) -> None:
    spec = StatisticsSpec(name="s", panel=Panel(features=tuple(f"gene{i}" for i in range(12))),
                          labels=("type 0", "type 1", "type 2"), limits=Limits(rounds=1, sites_to_start=2))
    (consortium / "strict.json").write_bytes(encode_spec(spec))
    site = ("--site", "a/bad.toml")
    text = (consortium / "a" / "site.toml").read_text().replace("a.h5ad", "bad.h5ad")
    (consortium / "a" / "bad.toml").write_text(text)
    (consortium / "bad.h5ad").unlink(missing_ok=True)
    if "missing" not in change:
        write_bad_cells(consortium / "bad.h5ad", **change)
    said = swarmchain("run", "propose", *site, "--spec", "strict.json", "--json", folder=consortium)
    run = json.loads(said)["run"]
    said = swarmchain("run", "join", run, *site, folder=consortium, code=1)
    assert words in said
    assert len(said.strip().splitlines()) == 2  # one line, and the hint
    listed = json.loads(swarmchain("run", "list", *site, "--json", folder=consortium))
    assert listed[run - 1]["joined"] == []


def write_bad_cells(path: Path, *, cells: int = 30, features: int = 12, nan: bool = False, label: str = "") -> None:
    write_cells(path, cells=max(cells, 3), features=features)
    data = anndata.read_h5ad(path)
    if nan:
        data.X[1, 1] = np.nan
    if label:
        data.obs["cell_type"] = [*[label] * 10, *data.obs["cell_type"].astype(str)[10:]]  # fewer are left out
    data[:cells].copy().write_h5ad(path)


def test_invalid_engine_without_node(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = subprocess.run([sys.executable, "-m", "swarmchain", "devchain", "--engine", "hardhat"], cwd=tmp_path,
                          env={"PATH": str(tmp_path / "empty"), "HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Node" in done.stderr or "node" in done.stderr


def test_demo_whose_reader_leaves(tmp_path: Path) -> None:
    """`swarmchain demo | head -1`: it stops without a traceback and without an orphan."""
    process = subprocess.Popen([sys.executable, "-m", "swarmchain", "demo", "--out", str(tmp_path / "out")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    time.sleep(2)
    children = list_children(process.pid)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1, errors
    assert "Traceback" not in errors
    assert_gone(children)


def test_devchain_stops_cleanly(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-m", "swarmchain", "devchain"], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    found = re.search(r"http://[\d.:]+\d", process.stdout.readline())
    assert found
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0
    process.stdout.close()
    assert wait_until_gone(found[0], timeout_s=5)


def list_children(pid: int) -> set[int]:
    return {child.pid for child in psutil.Process(pid).children(recursive=True)}


def assert_gone(children: set[int]) -> None:
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [child for child in children if psutil.pid_exists(child)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_interrupted_leaves_no_orphan(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-m", "swarmchain", "demo", "--out", str(tmp_path / "out")],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("agents:"):
            break
    children = list_children(process.pid)
    assert len(children) >= 5
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait(timeout=30) == 130, rest
    process.stdout.close()
    assert "Traceback" not in rest
    assert_gone(children)
    assert not (tmp_path / "out" / "summary.json").exists()


def test_demo_repeats_to_the_last_bit(tmp_path: Path) -> None:
    finals = []
    for out in ("one", "two"):
        run_process("demo", "--out", out, "--rounds", 10, folder=tmp_path)
        summary = json.loads((tmp_path / out / "summary.json").read_text())
        assert summary["final"]["same_at_all_sites"] is True
        assert len(summary["rounds"]) == 10
        documented = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "summary.md").read_text()))
        assert {*summary, *summary["final"], *summary["run"], *summary["rounds"][0], *summary["sites"][0],
                *summary["metrics"], *summary["gas"], *summary["timing_s"], *summary["timing_s"]["rounds"][0]
                } <= documented
        finals.append(summary["final"]["checkpoint"])
        macro = {arm: summary["metrics"][arm]["macro_f1"] for arm in ("central", "swarm", "local_mean")}
        assert macro["swarm"] >= macro["local_mean"] + 0.15
        assert macro["swarm"] >= macro["central"] - 0.05
        page = (tmp_path / out / "report.html").read_text()
        assert finals[-1] in page
        assert not re.search(r"(src|href)=|@import|url\(", page)
    assert finals[0] == finals[1]
