"""The operator's path: commands of a consortium's day after, on a real chain, a real folder and real files."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_cells

from swarmchain.cli import main
from swarmchain.config import SiteCard
from swarmchain.consortium import Consortium, start_consortium
from swarmchain.describe import FIELDS, UNSPOKEN, compare_specs, describe_duration, describe_spec
from swarmchain.keys import create_keystore
from swarmchain.merging import Mean
from swarmchain.spec import (
    CellTypeSpec,
    Limits,
    Model,
    Panel,
    RehearsalSpec,
    StatisticsRef,
    StatisticsSpec,
    encode_spec,
)

# everything that any command of this file printed; a test at its end searches it
SAID: list[str] = []

STATISTICS = StatisticsSpec(name="sums", panel=Panel(features=tuple(f"gene{i}" for i in range(12))),
                            labels=("type 0", "type 1", "type 2"), limits=Limits(rounds=2, sites_to_start=3,
                                                                                 one_checkpoint=True))
REHEARSAL = RehearsalSpec(name="try", widths=(20, 5), limits=Limits(rounds=2, sites_to_start=3))
TRAINING = CellTypeSpec(name="types", panel=STATISTICS.panel, labels=STATISTICS.labels,
                        limits=Limits(rounds=3, sites_to_start=3), seed_checkpoint="ab" * 32,
                        statistics=StatisticsRef(run=1, spec="cd" * 32, checkpoint="ef" * 32))


def swarmchain(*words: object, folder: Path, code: int = 0) -> str:
    """One command, without a terminal; standard output and error together."""
    said = io.StringIO()
    with (contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said),
          pytest.raises(SystemExit) as end):
        main([str(word) for word in words])
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
    (("propose", "retire", "other.json"), "cannot read deployment"),
    (("approve", "99"), "there is no proposal 99"),
])
def test_invalid_change_of_the_consortium(sites: Path, words: tuple[str, ...], said: str) -> None:
    found = swarmchain("consortium", *words, "--site", "North/site.toml", folder=sites, code=1)
    assert said in found
    assert len(found.strip().splitlines()) <= 2


# -- a spec in words


@pytest.mark.parametrize("spec", [STATISTICS, TRAINING, REHEARSAL], ids=lambda s: s.task)
def test_spec_in_words_leaves_no_field_out(spec: Any) -> None:
    assert set(type(spec).model_fields) - UNSPOKEN <= set(FIELDS)
    lines = dict(describe_spec(spec))
    assert spec.name in lines["task"] and lines["leaves the site"]
    assert len(lines) >= len(set(type(spec).model_fields) - UNSPOKEN)


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


def write_spec(path: Path, spec: Any) -> Path:
    path.write_bytes(encode_spec(spec))
    return path
