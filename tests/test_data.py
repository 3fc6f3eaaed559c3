"""Files of cells: every format gives the same bytes, and what cannot be used is refused by name and key."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from cells import LABELS, load, make_spec, make_table, write
from click.testing import CliRunner
from conftest import write_cells
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmchain.cli import cli
from swarmchain.config import DataConfig, read_site_config
from swarmchain.data import load_site_data, read_cells, read_names
from swarmchain.errors import DataError
from swarmchain.inspection import inspect_data
from swarmchain.normalization import find_state
from swarmchain.selection import SiteData, choose_validation
from swarmchain.site_text import render_site_toml
from swarmchain.spec import Normalization


def write_10x(folder: Path, counts: np.ndarray, symbols: list[str]) -> Path:
    folder.mkdir()
    lines = [f"ENSG{i:011d}\t{name}\tGene Expression\n" for i, name in enumerate(symbols)]
    for name, text in (("features.tsv.gz", "".join(lines)),
                       ("barcodes.tsv.gz", "".join(f"c{i}\n" for i in range(len(counts))))):
        (folder / name).write_bytes(gzip.compress(text.encode()))
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        scipy.io.mmwrite(file, sp.coo_matrix(counts.T.astype(np.int64)))
    return folder


def write_labels(path: Path, cells: int) -> Path:
    path.write_text("cell,cell_type\n" + "".join(f"c{i},{LABELS[i % 2]}\n" for i in range(cells)))
    return path


def as_bytes(data: SiteData) -> tuple[bytes, ...]:
    return tuple(v.tobytes() for v in (data.x, data.y, data.present, data.train, data.validation))


# -- the same numbers, however they are stored


WRITERS: dict[str, Callable[[Path, np.ndarray], Path]] = {
    "float16": lambda p, x: write(p / "a.h5ad", x.astype(np.float16)),
    "float64": lambda p, x: write(p / "a.h5ad", x.astype(np.float64)),
    "int32": lambda p, x: write(p / "a.h5ad", x.astype(np.int32)),
    "csr": lambda p, x: write(p / "a.h5ad", sp.csr_matrix(x)),
    "csc": lambda p, x: write(p / "a.h5ad", sp.csc_matrix(x)),
    "zarr": lambda p, x: write(p / "a.zarr", x),
    "zarr csr": lambda p, x: write(p / "a.zarr", sp.csr_matrix(x)),
    "10x": lambda p, x: write_10x(p / "a", x, [f"g{i}" for i in range(x.shape[1])]),
}


@pytest.mark.filterwarnings("ignore")  # zarr and anndata on what they will change
@given(seed=st.integers(0, 2**32 - 1), cells=st.integers(12, 40), width=st.integers(2, 12))
@settings(max_examples=6)
@pytest.mark.parametrize("how", WRITERS)
def test_storage_does_not_change_a_byte(how: str, seed: int, cells: int, width: int) -> None:
    x = np.random.default_rng(seed).poisson(1.5, (cells, width)).astype(np.float32)
    x[:, 0] += 1
    with TemporaryDirectory() as folder:
        here = Path(folder)
        spec = make_spec([*(f"g{i}" for i in reversed(range(width))), "absent"])
        expected = as_bytes(load(write(here / "dense.h5ad", x), spec))
        more = {"labels": str(write_labels(here / "labels.csv", cells))} if how == "10x" else {}
        assert as_bytes(load(WRITERS[how](here, x), spec, **more)) == expected


@pytest.mark.filterwarnings("ignore")
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8)
def test_order_of_columns_does_not_matter(seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.poisson(2.0, (30, 9)).astype(np.float32)
    order = generator.permutation(9)
    names = [f"g{i}" for i in range(9)]
    with TemporaryDirectory() as folder:
        one = write(Path(folder) / "a.h5ad", x, features=names)
        other = write(Path(folder) / "b.h5ad", x[:, order], features=[names[i] for i in order])
        spec = make_spec(names[2:7])
        assert as_bytes(load(one, spec)) == as_bytes(load(other, spec))


def test_blocks_give_what_one_piece_gives(tmp_path: Path) -> None:
    x = np.random.default_rng(0).poisson(0.2, (4_300, 1_000)).astype(np.float32)  # dense: more than one block
    spec = make_spec([f"g{i}" for i in range(7)])
    dense, sparse = write(tmp_path / "a.h5ad", x), write(tmp_path / "b.h5ad", sp.csr_matrix(x))
    assert as_bytes(load(dense, spec)) == as_bytes(load(sparse, spec))


def test_validation_cells_are_those_of_the_hexadecimal_hashes() -> None:
    import hashlib

    names = np.array([f"cell {i}" for i in range(300)])
    y = np.arange(300) % 4
    hashes = [hashlib.sha256(n.encode()).hexdigest() for n in names.tolist()]
    expected = [i for k in range(4) for i in sorted(np.flatnonzero(y == k), key=lambda i: hashes[i])[:18]]
    assert choose_validation(names, y, share=0.25).tolist() == sorted(expected)


# -- what a site may set


def test_rows_donors_and_layers_of_one_file(tmp_path: Path) -> None:
    data = make_table(np.random.default_rng(0).poisson(3.0, (40, 5)).astype(np.float32))
    data.obs["sample"] = ["S1", "S2"] * 20
    data.obs["sample"] = data.obs["sample"].sort_values().to_numpy()
    data.obs["donor"] = [f"d{i % 4}" for i in range(40)]
    data.layers["counts"] = data.X.copy()
    data.raw = data
    data.X = (data.X - data.X.mean(axis=0)) / data.X.std(axis=0)
    data.write_h5ad(tmp_path / "a.h5ad")
    spec = make_spec(["g0", "g4"])
    with pytest.raises(DataError, match=r"a\.h5ad: X holds negative values .* so it was scaled"):
        load(tmp_path / "a.h5ad", spec)
    both = [load(tmp_path / "a.h5ad", spec, where={"sample": s}, donor_column="donor", layer="counts")
            for s in ("S1", "S2")]
    whole = load(tmp_path / "a.h5ad", spec, layer="raw", donor_column="donor")
    assert np.concatenate([d.x for d in both]).tobytes() == whole.x.tobytes()
    numbers = np.concatenate([d.donors for d in both if d.donors is not None])
    assert [f"d{number}" for number in numbers] == data.obs["donor"].tolist()


def test_card_shows_names_as_a_run_sees_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", np.ones((4, 3), np.float32), features=["CD3e", "HLADR", "CD19-FITC"])
    assert read_names(path, "cell_type") == (["CD3", "HLA-DR", "CD19"], ["a", "b"])
    config = DataConfig(path="", label_column="cell_type", label_map={"a": "A", "b": ""}, aliases={"CD3e": "T3"})
    assert read_names(path, "cell_type", settings=config) == (["T3", "HLA-DR", "CD19"], ["A"])


def test_table_of_proportions(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    path.write_text("donor,total,T,B,cell_type\n" + "".join(f"d{i},200,{50 + i},{20 + i},{LABELS[i % 2]}\n"
                                                             for i in range(20)))
    spec = make_spec(["T", "B"], normalization=Normalization(kind="proportions"))
    data = load(path, spec, total_column="total")
    assert np.array_equal(data.x, np.array([[(50 + i) / 200, (20 + i) / 200] for i in range(20)], np.float32))
    assert np.allclose(load(path, make_spec(["T", "B", "total"], normalization=spec.normalization)).x.sum(axis=1), 1)


@pytest.mark.parametrize(("x", "state"), [
    (np.array([[1.0, 2.0], [0.0, 7.0]]), "counts"), (np.array([[0.0, 2.5], [0.2, 7.1]]), "log1p"),
    (np.array([[0.0, 0.5], [0.25, 0.1]]), "proportions"), (np.array([[0.0, 77.5], [0.2, 900.0]]), "intensities"),
    (np.array([[-90.0, 77.5], [0.2, 900.0]]), "intensities"), (np.random.default_rng(0).normal(size=(50, 9)), "scaled"),
])
def test_state_is_told_from_the_numbers(x: np.ndarray, state: str) -> None:
    assert find_state(x).state == state
    assert find_state(sp.csr_matrix(x)).state == state


# -- bad input: one line that names file and key, one hint


def set_values(data: anndata.AnnData, value: float, at: tuple[int, int] = (0, 0)) -> None:
    data.X[at] = value


def scale(data: anndata.AnnData) -> None:
    data.X = ((data.X - data.X.mean(axis=0)) / data.X.std(axis=0)).astype(np.float32)


def narrow(data: anndata.AnnData) -> None:
    data.X = data.X.astype(np.float16)
    data.X[2, 2] = np.inf


SPOILT: dict[str, tuple[Callable[[anndata.AnnData], Any], str]] = {
    "nan": (lambda d: set_values(d, np.nan), "X holds NaN or infinity"),
    "infinite float16": (narrow, "X holds NaN or infinity"),
    "negative": (lambda d: set_values(d, -1), "negative values"),
    "negative far from the sample": (lambda d: set_values(d, -1, (-10, 2)), "negative values"),
    "fraction far from the sample": (lambda d: set_values(d, 1.5, (-10, 2)), "fraction"),
    "scaled": (scale, "was scaled"),
    "intensities": (lambda d: setattr(d, "X", d.X * 12.34), "neither counts nor log1p"),
    "feature twice": (lambda d: setattr(d, "var_names", ["g0", "g0", "g2", "g3"]),
                      "'g0' stands twice among its features"),
    "feature without name": (lambda d: setattr(d, "var_names", ["g0", "", "g2", "g3"]), "have no name"),
    "cell twice": (lambda d: setattr(d, "obs_names", [*d.obs_names[:-1], "c0"]), "stand twice among its cells"),
    "one class": (lambda d: d.obs.__setitem__("cell_type", "a"), "column 'cell_type' gives one class only"),
    "no labels": (lambda d: d.obs.__setitem__("cell_type", pd.Categorical([None] * d.n_obs, ["a"])),
                  "column 'cell_type' holds no label"),
    "unknown label": (lambda d: d.obs.__setitem__("cell_type", ["a", "c"] * (d.n_obs // 2)),
                      "label 'c' is not on the run's list"),
    "other panel": (lambda d: setattr(d, "var_names", list("wxyz")), "holds 0 of the panel's 4 features"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", SPOILT)
def test_invalid_file_names_itself_and_what_to_do(tmp_path: Path, how: str) -> None:
    x = np.random.default_rng(1).poisson(4.0, (4000, 4)).astype(np.float32)
    data = make_table(x)
    spoilt, words = SPOILT[how]
    spoilt(data)
    data.write_h5ad(tmp_path / "site.h5ad")
    (tmp_path / "site.toml").write_text(render_site_toml(
        name="A", rpc_url="http://h:1", deployment="d", store="s", data="site.h5ad", label_column="cell_type"))
    config = read_site_config(tmp_path / "site.toml")
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        load_site_data(config, make_spec([f"g{i}" for i in range(4)]))
    assert str(tmp_path / "site.h5ad") in caught.value.message
    assert "\n" not in caught.value.message and caught.value.hint


@pytest.mark.parametrize(("more", "words"), [
    ({"layer": "counts"}, "has no layer 'counts'"), ({"donor_column": "who"}, "no column 'who'"),
    ({"where": {"sample": "S1"}}, "no column 'sample'"), ({"where": {"cell_type": "z"}}, "no cell has 'z'"),
    ({"feature_column": "gene_ids"}, "no column 'gene_ids' in .var"), ({"total_column": "n"}, "no feature 'n'"),
    ({"features": "ensembl"}, "asks for ensembl"), ({"labels": "nowhere.csv"}, "cannot read nowhere.csv"),
    ({"feature_table": "nowhere.csv"}, "cannot read nowhere.csv"), ({"state": "log1p"}, "taken for log1p"),
])
def test_invalid_setting_names_the_key(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    x = np.random.default_rng(0).poisson(30.0, (20, 120)).astype(np.float32)
    path = write(tmp_path / "a.h5ad", x)
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        load(path, make_spec(["g0"]), **more)
    assert caught.value.hint


@pytest.mark.parametrize(("name", "words"), [
    ("a.loom", "is of no kind"), ("folder", "holds neither"), ("a.h5ad", "cannot read"), ("a.h5", "cannot read"),
    ("a.csv", "has no column of numbers"),
])
def test_invalid_format(tmp_path: Path, name: str, words: str) -> None:
    path = tmp_path / name
    path.mkdir() if name == "folder" else path.write_bytes(b"a,b\nc,d\n")
    with pytest.raises(DataError, match=words) as caught:
        load(path, make_spec(["g0"]))
    assert str(path) in caught.value.message


def test_ten_x_names_twice_need_ids(tmp_path: Path) -> None:
    path = write_10x(tmp_path / "a", np.random.default_rng(0).poisson(5.0, (22, 3)), ["TBCE", "TBCE", "CD3E"])
    labels = str(write_labels(tmp_path / "labels.csv", 20))
    with pytest.raises(DataError, match="'TBCE' stands twice") as caught:
        load(path, make_spec(["TBCE"]), labels=labels)
    assert "gene_ids" in caught.value.hint
    data = load(path, make_spec(["ENSG00000000001"]), labels=labels, feature_column="gene_ids")
    assert data.x.shape == (20, 1)  # the two cells that the table does not name are left out


def test_ten_x_h5(tmp_path: Path) -> None:
    import h5py

    counts = sp.csc_matrix(np.random.default_rng(0).poisson(5.0, (3, 10)))  # features × cells
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = [f"c{i}".encode() for i in range(10)]
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(counts, name)
        group["shape"] = np.array(counts.shape)
        features = group.create_group("features")
        for name, values in {"id": ["ENSG1", "ENSG2", "ENSG3"], "name": ["A", "B", "C"], "genome": ["h"] * 3,
                             "feature_type": ["Gene Expression"] * 3}.items():
            features[name] = [v.encode() for v in values]
    data = load(tmp_path / "a.h5", make_spec(["B"]), labels=str(write_labels(tmp_path / "labels.csv", 10)))
    totals = np.asarray(counts.sum(axis=0)).ravel()
    assert np.allclose(data.x[:, 0], np.log1p(counts.toarray()[1] / totals * 1e4))


# -- the command


def test_data_check_reports_without_names_or_values(tmp_path: Path) -> None:
    path = write_cells(tmp_path / "a.h5ad", donor=["d1", "d2", "d3"] * 30)
    options = ["--label-column", "cell_type", "--donor-column", "donor", "--json"]
    done = CliRunner().invoke(cli, ["data", "check", str(path), *options], catch_exceptions=False)
    found = json.loads(done.output)
    assert (found["cells"], found["state"], found["labels"]) == (90, "counts", {f"type {i}": 30 for i in range(3)})
    assert found["donors"] == {"d1": 30, "d2": 30, "d3": 30}
    assert "s0c1" not in done.output and "gene1" not in done.output
    (tmp_path / "site.toml").write_text(render_site_toml(
        name="A", rpc_url="http://h:1", deployment="d", store="s", data="a.h5ad", label_column="cell_type",
        label_map={"type 0": ""}))
    done = CliRunner().invoke(cli, ["data", "check", "--site", str(tmp_path / "site.toml")], catch_exceptions=False)
    assert "left out: 30 cells by the mapping" in done.output
    assert "X: counts: all values are whole numbers" in done.output


def test_warnings_say_where_normalisation_came_too_late(tmp_path: Path) -> None:
    x = np.random.default_rng(0).poisson(3.0, (60, 150)).astype(np.float32)
    normal = np.log1p(x / x.sum(axis=1, keepdims=True) * 1e4)
    config = DataConfig(path="", label_column="cell_type")
    for values, words in ((normal, "normalised after features were chosen"), (normal[:, :120], "not to one number"),
                          (x, "counts of only 150 features")):
        path = write(tmp_path / "a.h5ad", values)
        assert any(words in warning for warning in inspect_data(path, config).warnings), words


def test_file_of_an_old_anndata_whose_counts_are_in_raw() -> None:
    import scanpy

    path = Path(scanpy.__file__).parent / "datasets" / "10x_pbmc68k_reduced.h5ad"
    config = DataConfig(path="", label_column="bulk_labels")
    with pytest.raises(DataError, match="with mean 0 and SD 1 per feature") as caught:
        read_cells(path, config, Normalization())
    assert 'layer = "raw"' in caught.value.hint
    assert read_cells(path, config.model_copy(update={"layer": "raw"}), Normalization()).x.shape == (700, 765)
