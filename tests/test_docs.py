"""The documents say what is so: the guide's commands run, the reference is the commands' own help, examples parse."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from conftest import ROOT

from swarmchain.cli import cli
from swarmchain.cli.agent import WORDS
from swarmchain.config import read_site_config
from swarmchain.devchain import Devchain
from swarmchain.protocol import compute_digest
from swarmchain.site_text import render_site_toml

GUIDE = (ROOT / "docs" / "consortium.md").read_text()
PAGES = [p for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md"),
                     *(ROOT / "contracts").glob("*.md")]]


def walk(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if not isinstance(command, click.Group):
        yield words, command
        return
    for name, child in command.commands.items():
        yield from walk(child, (*words, name))


COMMANDS = dict(walk(cli))


def test_command_reference_is_the_commands_help() -> None:
    command = [sys.executable, ROOT / "docs" / "generate_cli.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_event_has_words_for_a_person() -> None:
    said = {name for path in ("acts", "agent", "cli/agent") for name in re.findall(
        r'(?:"event": |say\()"([A-Za-z ]+)"', (ROOT / "swarmchain" / f"{path}.py").read_text())}
    assert {"trained", "ended", "stalled"} < said <= set(WORDS)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_has_help_and_an_example_that_parses(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    assert command.help
    assert [p.name for p in command.params if isinstance(p, click.Option) and not p.help] == []
    example = (command.epilog or "").split("Example:\n")[1].replace("\\\n", " ")
    parts = shlex.split(example)
    assert tuple(parts[1 : 1 + len(words)]) == words
    command.make_context(words[-1], parts[1 + len(words) :])


def test_annotated_site_toml_is_what_site_init_writes() -> None:
    text = render_site_toml(
        name="North", rpc_url="http://127.0.0.1:8545", deployment="../deployments/31337.json", store="../store",
        data="../cells/North.h5ad", label_column="cell_type", label_map={"CD19+ B": "B cell", "CD34+": ""})
    assert (ROOT / "deploy" / "site.toml").read_text() == text
    assert read_site_config(ROOT / "deploy" / "site.toml").data.label_map == {"CD19+ B": "B cell", "CD34+": ""}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_architecture_has_every_room_and_the_layers_that_are_checked() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    table = text.split("| room |")[1].split("\n\n")[0]
    rooms = "".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| `"))
    named = set(re.findall(r"`(\w+)`", rooms))
    assert {path.stem for path in (ROOT / "swarmchain").glob("[!_]*.py")} == named - {"cli"}
    shown = re.search(r"    errors →.*→ cli\n", text, re.DOTALL)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    layers = [layer.replace("swarmchain.", "") for layer in reversed(settings)]
    assert shown is not None and " ".join(shown[0].split()) == " → ".join(layers)


def test_every_page_is_in_the_sites_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().split("nav:")[-1]
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r": (\S+\.md)$", nav, re.MULTILINE)) == pages


def test_three_sites_and_a_run_take_twelve_commands() -> None:
    """What the guide makes a reader type, from the chain to the second run under way."""
    blocks = "".join(re.findall(r"```sh\n(.*?)```", GUIDE.split("## 6.")[0], re.DOTALL)).replace("\\\n", " ")
    commands = [line for line in blocks.splitlines() if line.startswith("swarmchain ")]
    assert len(commands) == 12
    assert sum(" site init " in line for line in commands) == 3


def run_guide(script: str, folder: Path, env: dict[str, str]) -> str:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=env, capture_output=True,
                          text=True, timeout=200, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, script + done.stdout + done.stderr
    return done.stdout


def wait_for(log: Path, words: str, timeout_s: float = 120.0) -> str:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if words in line:
                return line
        time.sleep(0.1)
    raise AssertionError(f"{log} never said {words!r}: {log.read_text()}")


def test_guide_runs_as_written(anvil: Devchain, tmp_path: Path) -> None:
    """docs/consortium.md, block by block; only the chain is one that is already up, and fewer rounds are trained."""
    guide = GUIDE.replace("http://127.0.0.1:8545", anvil.rpc_url).replace("--rounds 12", "--rounds 3")
    guide = guide.replace("swarmchain site init", f"swarmchain site init --rpc-url {anvil.rpc_url}")
    blocks = re.findall(r"```sh\n(.*?)```", guide, re.DOTALL)
    assert "make setup" in guide and ". .venv/bin/activate" in blocks[0]
    bin_folder = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "SWARMCHAIN_PASSWORD": "correct horse"}
    agents: list[subprocess.Popen[str]] = []
    logs: list[Path] = []
    ends: set[str] = set()
    said = ""
    try:
        for block in blocks[1:]:
            if "swarmchain agent" in block:
                for i, command in enumerate(block.strip().splitlines()):
                    logs.append(tmp_path / f"agent-{i}.log")
                    with logs[-1].open("w") as output:
                        agents.append(subprocess.Popen(shlex.split(command), cwd=tmp_path, env=env, stdout=output,
                                                       text=True, start_new_session=True))
                for log in logs:
                    wait_for(log, "run 1  ended: done")
            elif "devchain" not in block:
                if "run export" in block:
                    ends = {re.findall(r"checkpoint (\w+)", wait_for(log, "run 2  ended: done"))[0] for log in logs}
                said = run_guide(block, tmp_path, env)
    finally:
        for agent in agents:
            agent.terminate()
        codes = [agent.wait(20) for agent in agents]
    assert codes == [0, 0, 0]
    assert len(ends) == 1
    # the run is sealed: its members' own commands open it
    run_guide("swarmchain site doctor --site north/site.toml --run 2", tmp_path, env)
    run_guide("swarmchain run verify 2 --site east/site.toml", tmp_path, env)
    digest = compute_digest((tmp_path / "model" / "model.safetensors").read_bytes())
    assert digest in said
    assert digest == ends.pop()
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["checkpoint"] == digest
