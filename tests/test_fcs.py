"""FCS files: written by flowio, broken byte by byte, and real ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flowio
import numpy as np
import pytest
from cells import load, make_spec, need
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmchain.config import DataConfig
from swarmchain.data import read_cells, read_names
from swarmchain.errors import DataError
from swarmchain.fcs import read_events, read_header
from swarmchain.inspection import inspect_data
from swarmchain.spec import Normalization, Panel

CHANNELS = ("FSC-A", "FL1-A", "FL2-A", "Time")
ANTIGENS = ("", "CD3-FITC", "HLADR-PE", "")
SPILL = "2,FL1-A,FL2-A,1,0.2,0.1,1"
FLOW = Normalization(kind="arcsinh", cofactor=150)


def write_fcs(path: Path, *, events: int = 30, seed: int = 0, spill: str | None = SPILL, key: str = "$SPILLOVER",
              channels: tuple[str, ...] = CHANNELS, antigens: tuple[str, ...] = ANTIGENS) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(1, 9_000, (events, len(channels))).astype(np.float32)
    more = {} if spill is None else {key: spill}
    with path.open("wb") as file:
        flowio.create_fcs(file, values.ravel().tolist(), list(channels), list(antigens), metadata_dict=more)
    return values


def write_labels(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_channels_antigens_and_compensation(tmp_path: Path) -> None:
    values = write_fcs(tmp_path / "a.fcs")
    header = read_header(tmp_path / "a.fcs", compensate="auto")
    assert header.channels == CHANNELS
    assert header.antigens == ("FSC-A", "CD3-FITC", "HLADR-PE", "Time")
    true = values[:, 1:3] @ np.linalg.inv([[1, 0.2], [0.1, 1]])
    assert np.allclose(read_events(header)[:, 1:3], true, rtol=1e-5)
    assert np.array_equal(read_events(header)[:, [0, 3]], values[:, [0, 3]])
    raw = read_header(tmp_path / "a.fcs", compensate=False)
    assert raw.spillover is None and np.array_equal(read_events(raw), values)


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_events_come_back_as_they_were_written(width: int, events: int, seed: int) -> None:
    from tempfile import TemporaryDirectory

    names = tuple(f"CD{i}" for i in range(width))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.fcs"
        values = write_fcs(path, events=events, seed=seed, spill=None, channels=names, antigens=names)
        assert np.array_equal(read_events(read_header(path, compensate="auto")), values)


def test_folder_is_a_site_whose_files_are_donors(tmp_path: Path) -> None:
    for i in range(3):
        write_fcs(tmp_path / f"p{i}.fcs", events=10 + i, seed=i)
    names = write_labels(tmp_path / "labels.csv", "file,cell_type,who\np0.fcs,a,X\np1,b,Y\n")
    config = DataConfig(path=str(tmp_path), label_column="cell_type", labels=names)
    assert read_names(tmp_path, "cell_type", settings=config) == (["CD3", "HLA-DR"], ["a", "b"])
    cells = read_cells(tmp_path, config, FLOW)
    assert cells.features == ("CD3", "HLA-DR") and len(cells.names) == 21  # p2 has no label
    assert cells.donors is not None and cells.donors.tolist() == ["p0"] * 10 + ["p1"] * 11
    assert cells.names[0] == "p0:0" and cells.labels.tolist() == ["a"] * 10 + ["b"] * 11
    named = read_cells(tmp_path, config.model_copy(update={"donor_column": "who"}), FLOW)
    assert named.donors is not None and set(named.donors.tolist()) == {"X", "Y"}
    scatter = read_cells(tmp_path, config, FLOW, panel=Panel(features=("FSC-A", "CD3")))
    assert scatter.features == ("FSC-A", "CD3")


def test_labels_of_events(tmp_path: Path) -> None:
    write_fcs(tmp_path / "p.fcs", events=6)
    text = "file,event,cell_type\n" + "".join(f"p.fcs,{i},{'ab'[i % 2]}\n" for i in (5, 0, 3))
    labels = write_labels(tmp_path / "events.csv", text)
    cells = read_cells(tmp_path / "p.fcs", DataConfig(path="", label_column="cell_type", labels=labels), FLOW)
    assert (cells.names.tolist(), cells.labels.tolist()) == (["p:0", "p:3", "p:5"], ["a", "b", "b"])
    labels = write_labels(tmp_path / "events.csv", text.replace("5", "6"))
    with pytest.raises(DataError, match=r"events\.csv: column event .* 0 to 5"):
        read_cells(tmp_path / "p.fcs", DataConfig(path="", label_column="cell_type", labels=labels), FLOW)


def put(data: bytes, key: str, value: str) -> bytes:
    """Another value of a keyword, of the same length."""
    found = re.search(rb"/\$?" + key.encode() + rb"/([^/]+)/", data)
    assert found is not None
    old = found.group(1)
    return data[: found.start(1)] + value.rjust(len(old)).encode() + data[found.end(1) :]


def shift_both(data: bytes, by: int) -> bytes:
    """Both places say the same wrong start of the data."""
    start = int(data[26:34])
    return put(data[:26] + f"{start + by:8d}".encode() + data[34:], "BEGINDATA", str(start + by))


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "start in the text differs": (lambda d: put(d, "BEGINDATA", str(int(d[26:34]) + 4)), r"\$BEGINDATA or \$ENDDATA"),
    "stop in the text differs": (lambda d: put(d, "ENDDATA", str(int(d[34:42]) - 4)), r"\$BEGINDATA or \$ENDDATA"),
    "stop in the header differs": (lambda d: d[:34] + f"{int(d[34:42]) + 1:8d}".encode() + d[42:], r"\$ENDDATA"),
    "both starts wrong": (lambda d: shift_both(d, 8), r"\$BEGINDATA \d+ and \$ENDDATA"),
    "cut short": (lambda d: d[:-40], r"\$BEGINDATA or \$ENDDATA"),
    "more events than values": (lambda d: put(d, "TOT", "31"), r"\$TOT"),
    "several data sets": (lambda d: put(d, "NEXTDATA", "9"), r"\$NEXTDATA"),
    "no FCS": (lambda d: b"PK" + bytes(200), "cannot read"),
    "empty": (lambda d: b"", "cannot read"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_invalid_fcs_that_was_damaged(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.fcs"
    write_fcs(path)
    damage, words = DAMAGED[how]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=words) as caught:
        read_events(read_header(path, compensate="auto"))
    assert str(path) in caught.value.message and caught.value.hint and "\n" not in caught.value.message


@pytest.mark.parametrize(("spill", "words"), [
    ("2,FL1-A,FL2-A,1,0.2,0.1", "holds 3 numbers"), ("x,FL1-A", "is not n, n channels"),
    ("2,FL1-A,FL9-A,1,0,0,1", "'FL9-A', which is no \\$PnN"), ("2,FL1-A,FL1-A,1,0,0,1", "not unique"),
    ("2,FL1-A,FL2-A,1,1,1,1", "cannot be inverted"), ("2,FL1-A,FL2-A,1,nan,0,1", "cannot be inverted"),
    ("2,FL1-A,FL2-A,1,a,0,1", "is not n, n channels"),
])
def test_invalid_spillover(tmp_path: Path, spill: str, words: str) -> None:
    write_fcs(tmp_path / "a.fcs", spill=spill)
    with pytest.raises(DataError, match=rf"a\.fcs: \$SPILLOVER.*{words}") as caught:
        read_header(tmp_path / "a.fcs", compensate="auto")
    assert "compensate = false" in caught.value.hint
    read_header(tmp_path / "a.fcs", compensate=False)


@pytest.mark.parametrize("key", ["$SPILLOVER", "$SPILL", "$COMP"])
def test_spillover_by_its_older_names(tmp_path: Path, key: str) -> None:
    write_fcs(tmp_path / "a.fcs", key=key)
    assert read_header(tmp_path / "a.fcs", compensate=True).spillover is not None


def test_invalid_missing_spillover(tmp_path: Path) -> None:
    write_fcs(tmp_path / "a.fcs", spill=None)
    with pytest.raises(DataError, match=r"a\.fcs has no \$SPILLOVER .* compensate"):
        read_header(tmp_path / "a.fcs", compensate=True)
    found = inspect_data(tmp_path / "a.fcs", DataConfig(path="", label_column=""))
    assert any("no $SPILLOVER" in warning for warning in found.warnings)


def test_invalid_folder_of_two_panels(tmp_path: Path) -> None:
    write_fcs(tmp_path / "a.fcs")
    write_fcs(tmp_path / "b.fcs", antigens=("", "CD4-FITC", "HLADR-PE", ""))
    with pytest.raises(DataError, match=r"b\.fcs has not the channels of a\.fcs: 'CD3-FITC'"):
        read_names(tmp_path, "file")


@pytest.mark.parametrize(("text", "words"), [
    ("file,cell_type\nq.fcs,a\n", "names none of the 1 FCS files"), ("file,kind\np.fcs,a\n", "no column 'cell_type'"),
    ("file,cell_type\np.fcs,a\np.fcs,b\n", "names p.fcs twice"),
])
def test_invalid_labels_of_files(tmp_path: Path, text: str, words: str) -> None:
    write_fcs(tmp_path / "p.fcs")
    labels = write_labels(tmp_path / "labels.csv", text)
    with pytest.raises(DataError, match=words):
        load(tmp_path / "p.fcs", make_spec(["CD3"], normalization=FLOW), labels=labels)


# -- real data


def test_real_fcs_files() -> None:
    folder = need("flowcap2_aml/fcs")
    settings: dict[str, Any] = {"labels": str(folder / "fcs_info.csv")}
    config = DataConfig(path=str(folder), label_column="Label", **settings)
    cells = read_cells(folder, config, FLOW)
    assert cells.features == ("CD15", "CD13", "CD45", "CD16", "CD56") and len(cells.names) == 10_000
    assert cells.donors is not None and len(np.unique(cells.donors)) == 20
    found = inspect_data(folder, config)
    assert found.labels == {"aml": 5_000, "normal": 5_000} and found.state == "intensities"


def test_real_counts_of_populations_become_proportions() -> None:
    path = need("flowcap2_aml/population_counts_359.csv.gz")
    config = DataConfig(path="", label_column="class", donor_column="id", labels_key="id", total_column="Unnamed: 1",
                        labels=str(need("flowcap2_aml/population_meta_359.csv")))
    cells = read_cells(path, config, Normalization(kind="proportions"))
    assert cells.x.shape == (359, 378) and cells.x.min() >= 0 and cells.x.max() <= 1
    assert (cells.labels == "aml").sum() == 43
    at = cells.features.index("FS-"), cells.features.index("FS+")
    assert np.abs(cells.x[:, at[0]] + cells.x[:, at[1]] - 1).max() < 0.01


@pytest.mark.filterwarnings("ignore")
def test_real_files_have_states_that_are_told_from_their_numbers() -> None:
    states = {"kang": "counts", "pbmc3k": "log1p", "pbmc68k": "log1p", "symphony10x": "log1p", "zheng_facs": "counts"}
    for name, state in states.items():
        path = need(f"pbmc_multistudy/{name}.h5ad")
        config = DataConfig(path="", label_column="cell_type")
        assert inspect_data(path, config).state == state
        cells = read_cells(path, config, Normalization(), panel=Panel(features=("CD3E", "LYZ", "MS4A1")))
        assert cells.x.max() < 20
    small = need("cytof_multicenter/cytof_multicenter_small.h5ad")
    parts = [read_cells(small, DataConfig(path="", label_column="cell_type", donor_column="sample",
                                          where={"sample": f"S{i + 1:02d}"}), Normalization(kind="arcsinh"))
             for i in range(16)]
    assert [len(part.names) for part in parts] == [4_000] * 16
    assert all(part.donors is not None and len(np.unique(part.donors)) == 1 for part in parts)
