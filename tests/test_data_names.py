"""What features and labels are called: pinned tables, aliases, mapping files, the Cell Ontology."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from cells import load, make_spec, make_table, need, write

from swarmchain.config import DataConfig, read_site_config
from swarmchain.data import read_cells
from swarmchain.errors import DataError, SpecError
from swarmchain.labels import is_cell_ontology_id, read_label_map
from swarmchain.names import SYNONYMS, Naming, find_kind, parse_name_table, rename_features
from swarmchain.protocol import compute_digest
from swarmchain.selection import select_cells
from swarmchain.site_text import render_site_toml
from swarmchain.spec import Normalization, Panel, Term, encode_spec, parse_spec
from swarmchain.store import Store
from swarmchain.work import RunWork

TABLE = b"ensembl,symbol\nENSG00000198851,CD3E\nENSG00000010610,CD4\nENSG00000153563,CD8A\n"


# -- markers


@pytest.mark.parametrize(("theirs", "panel"), [
    ("CD3e", "CD3"), ("cd3E", "CD3"), ("HLADR", "HLA-DR"), ("HLA DR", "HLA-DR"), ("CD45-ECD", "CD45"),
    ("141Pr_CD45", "CD45"), ("CD4 PE-Cy7-A", "CD4"), ("CD196", "CCR6"), ("PD1", "CD279"), ("TCRγδ", "TCRgd"),
    ("CD16 BV421", "CD16"), ("Ki67", "Ki-67"),
])
def test_markers_go_by_their_usual_other_names(theirs: str, panel: str) -> None:
    assert rename_features([theirs, "CD19"], Naming(), wanted=(panel, "CD19"), source="x") == (panel, "CD19")


def test_markers_keep_exact_names_and_antibodies_apart() -> None:
    assert rename_features(["CD3", "CD3e"], Naming(), wanted=("CD3",), source="x") == ("CD3", "CD3e")
    two = ("CD45-FITC", "CD45-PE")
    assert rename_features(two, Naming(), wanted=None, source="x") == two
    assert rename_features(["Cd45-RA"], Naming(), wanted=None, source="x") == ("Cd45-RA",)
    with pytest.raises(DataError, match=r"x: features 'CD45-FITC' and 'CD45-PE' come to one name, 'CD45'"):
        rename_features(two, Naming(), wanted=("CD45",), source="x")
    aliases = {"CD45-PE": "other"}
    assert rename_features(two, Naming(aliases=aliases), wanted=("CD45",), source="x") == ("CD45", "other")


def test_synonyms_stand_for_one_antigen_each() -> None:
    from swarmchain.names import _key

    keys = [_key(group[0]) for group in SYNONYMS]
    assert len(set(keys)) == len(keys)
    assert all(_key(name) == _key(group[0]) for group in SYNONYMS for name in group)


def test_aliases_of_the_run_and_of_the_site(tmp_path: Path) -> None:
    x = np.random.default_rng(0).poisson(5.0, (20, 150)).astype(np.float32)
    path = write(tmp_path / "a.h5ad", x)
    registered = make_spec([], panel=Panel(features=("A", "B"), aliases={"g3": "A", "g4": "B"}))
    plain = make_spec([], panel=Panel(features=("A", "B")))
    assert load(path, registered).x.tobytes() == load(path, plain, aliases={"g3": "A", "g4": "B"}).x.tobytes()
    with pytest.raises(SpecError, match="alias of 'Z'"):
        parse_spec(encode_spec(registered).replace(b'"g3":"A"', b'"g3":"Z"'))


# -- genes


def test_genes_by_a_pinned_table_either_way() -> None:
    table = parse_name_table(TABLE, source="t.csv")
    assert table.digest == compute_digest(TABLE)
    fill = [f"ENSG{i:011d}" for i in range(120)]
    ids = ["ENSG00000198851.12", "ENSG00000010610.9", *fill]
    assert rename_features(ids, Naming("symbol", table), wanted=None, source="x")[:3] == ("CD3E", "CD4", fill[0])
    named = rename_features(ids, Naming(table=table), wanted=("CD3E", "CD8A"), source="x")
    assert named[0] == "CD3E"
    symbols = ["CD3E", "CD4", *(f"X{i}" for i in range(120))]
    assert rename_features(symbols, Naming(table=table), wanted=fill, source="x")[:2] == (
        "ENSG00000198851", "ENSG00000010610")
    assert find_kind(ids) == "ensembl" and find_kind(symbols) == "symbols" and find_kind(["CD3"]) == "markers"
    assert rename_features(ids, Naming(), wanted=None, source="x")[0] == "ENSG00000198851"  # without its version


@pytest.mark.parametrize(("data", "words"), [
    (b"symbol,ensembl\n", "first line"), (b"ensembl,symbol\nCD3E,CD3E\n", "line 2"), (b"", "first line"),
    (TABLE + b"ENSG00000198851.2,CD3E\n", "line 5"), (b"ensembl,symbol\nENSG00000198851\n", "line 2"),
    (b"\xff", "no table"),
])
def test_invalid_name_table(data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=f"t.csv.*{words}"):
        parse_name_table(data, source="t.csv")


def test_invalid_name_table_that_is_not_the_runs(tmp_path: Path) -> None:
    data = make_table(np.random.default_rng(0).poisson(5.0, (20, 150)).astype(np.float32))
    data.var_names = [f"ENSG{i:011d}" for i in range(147)] + ["ENSG00000198851.3", "ENSG00000010610", "ENSG00000153563"]
    data.write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "genes.csv").write_bytes(TABLE)
    pinned = Panel(features=("CD3E", "CD4"), names=compute_digest(TABLE))
    found = load(tmp_path / "a.h5ad", make_spec([], panel=pinned), feature_table=str(tmp_path / "genes.csv"))
    assert found.present.all() and found.x.any(axis=0).all()
    with pytest.raises(DataError, match=r"pins a table of names"):
        load(tmp_path / "a.h5ad", make_spec([], panel=pinned))
    (tmp_path / "genes.csv").write_bytes(TABLE + b"ENSG00000111111,X\n")
    with pytest.raises(DataError, match=r"genes\.csv has the SHA-256 .*, the run pins"):
        load(tmp_path / "a.h5ad", make_spec([], panel=pinned), feature_table=str(tmp_path / "genes.csv"))


@pytest.mark.filterwarnings("ignore")
def test_real_genes_by_id_and_back(tmp_path: Path) -> None:
    path = need("pbmc_multistudy/zheng_facs.h5ad")
    var = anndata.read_h5ad(path, backed="r").var
    rows = [(e, s) for s, e in var["ensembl"].drop_duplicates(keep=False).items()][:500]
    (tmp_path / "genes.csv").write_text("ensembl,symbol\n" + "".join(f"{e},{s}\n" for e, s in rows))
    table = str(tmp_path / "genes.csv")
    symbols, ids = [s for _, s in rows], [e for e, _ in rows]
    by_symbol = read_cells(path, DataConfig(path="", label_column="cell_type"), Normalization(),
                           panel=Panel(features=tuple(symbols)))
    by_column = read_cells(path, DataConfig(path="", label_column="cell_type", feature_column="ensembl"),
                           Normalization(), panel=Panel(features=tuple(ids)))
    by_table = read_cells(path, DataConfig(path="", label_column="cell_type", feature_table=table), Normalization(),
                          panel=Panel(features=tuple(ids)))
    back = read_cells(path, DataConfig(path="", label_column="cell_type", feature_column="ensembl",
                                       feature_table=table), Normalization(), panel=Panel(features=tuple(symbols)))
    assert len(by_symbol.features) == 500
    assert (by_symbol.x != by_column.x).nnz == (by_symbol.x != by_table.x).nnz == (by_symbol.x != back.x).nnz == 0
    assert by_table.features == by_column.features and back.features == by_symbol.features


# -- labels


def make_labels(path: Path, labels: list[str]) -> Path:
    data = make_table(np.random.default_rng(0).poisson(5.0, (len(labels), 4)).astype(np.float32))
    data.obs["cell_type"] = labels
    data.write_h5ad(path)
    return path


def write_map(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.filterwarnings("ignore")
def test_labels_by_a_file_with_counts_of_those_left_out(tmp_path: Path) -> None:
    path = make_labels(tmp_path / "a.h5ad", ["T4", "B", "junk", "odd"] * 6)
    table = write_map(tmp_path / "map.tsv", "label\tshared\tontology\nT4\ta\tCL:0000624\nB\tb\t\njunk\t\t\n")
    with pytest.raises(DataError, match=r"a\.h5ad: label 'odd' is not on the run's list \(1 such labels\)"):
        load(path, make_spec(["g0"]), label_file=table)
    data = load(path, make_spec(["g0"]), label_file=table, unmapped="exclude")
    assert dict(data.excluded) == {"junk": 6, "odd": 6}
    assert np.bincount(data.y).tolist() == [6, 6] and len(data.x) == 12
    again = load(path, make_spec(["g0"]), label_map={"T4": "a", "B": "b", "junk": "", "odd": ""})
    assert (again.x.tobytes(), again.excluded) == (data.x.tobytes(), data.excluded)


@pytest.mark.parametrize(("text", "words"), [
    ("label,name\nT,a\n", "no column 'shared'"), ("label,shared\nT,a\nT,b\n", "label 'T' stands twice"),
    ("label,shared,ontology\nT,a,CL:84\n", "'CL:84' of label 'T' is no Cell Ontology id"), ("", "No columns"),
    ("label,shared,shared\nT,a,b\n", "column 'shared' stands twice"), ("label,shared\n", "has no rows"),
])
def test_invalid_mapping_file(tmp_path: Path, text: str, words: str) -> None:
    table = write_map(tmp_path / "map.csv", text)
    with pytest.raises(DataError, match=r"map\.csv.*" + re.escape(words)):
        read_label_map(DataConfig(path="", label_column="", label_file=table))


ONTOLOGY = {
    "CD4 T cell": Term(id="CL:0000624", parent="T cell"), "CD8 T cell": Term(id="CL:0000625", parent="T cell"),
    "T cell": Term(id="CL:0000084"), "naive CD4 T cell": Term(parent="CD4 T cell"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("label", "more", "words", "hint"), [
    ("T cell", "", "label 'T cell' is coarser than the run's (CD4 T cell, CD8 T cell)", "label these cells finer"),
    ("naive CD4 T cell", "", "is finer than the run's 'CD4 T cell'", '"naive CD4 T cell" = "CD4 T cell"'),
    ("T4", "T4,T4,CL:0000624\n", "'T4' is CL:0000624, which the run calls 'CD4 T cell'", '"T4" = "CD4 T cell"'),
    ("T4", "T4,CD4 T cell,CL:0000625\n", "the site's 'CD4 T cell' is CL:0000625, the run's is CL:0000624", "ontology"),
])
def test_invalid_label_of_another_level(tmp_path: Path, label: str, more: str, words: str, hint: str) -> None:
    path = make_labels(tmp_path / "a.h5ad", [label, "CD8 T cell"] * 6)
    settings: dict[str, Any] = {}
    if more:
        settings["label_file"] = write_map(tmp_path / "map.csv", "label,shared,ontology\n" + more)
    spec = make_spec(["g0"], ("CD4 T cell", "CD8 T cell"), ontology=ONTOLOGY)
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        load(path, spec, **settings)
    assert hint in caught.value.hint


def test_ontology_of_a_run_is_checked() -> None:
    assert is_cell_ontology_id("CL:0000084") and not is_cell_ontology_id("CL:84")
    spec = encode_spec(make_spec(["g0"], ontology={"a": Term(id="CL:0000084")}))
    assert parse_spec(spec).ontology["a"].id == "CL:0000084"
    with pytest.raises(SpecError, match="ontology"):
        parse_spec(spec.replace(b"CL:0000084", b"CL:84"))
    with pytest.raises(ValueError, match="one Cell Ontology id"):
        make_spec(["g0"], ontology={"a": Term(id="CL:0000084"), "b": Term(id="CL:0000084")})


def test_cells_without_panel_keep_all_features(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", np.ones((20, 3), np.float32))
    cells = read_cells(path, DataConfig(path="", label_column="cell_type"), Normalization())
    assert cells.features == ("g0", "g1", "g2")
    assert select_cells(cells, make_spec(["g2", "g0"])).x.shape == (20, 2)


def test_agent_fetches_the_table_that_the_run_pins(tmp_path: Path) -> None:
    from test_duties import make_view

    data = make_table(np.random.default_rng(0).poisson(5.0, (40, 150)).astype(np.float32))
    data.var_names = [f"ENSG{i:011d}" for i in range(148)] + ["ENSG00000198851.3", "ENSG00000010610"]
    data.write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "store").mkdir()
    (tmp_path / "site.toml").write_text(render_site_toml(
        name="A", rpc_url="http://h:1", deployment="d", store="store", data="a.h5ad", label_column="cell_type"))
    config = read_site_config(tmp_path / "site.toml")
    store = Store(config.store_url)
    panel = Panel(features=("CD3E", "CD4"), share_min=1.0, names=store.put_blob(TABLE))
    spec = store.put_blob(encode_spec(make_spec([], panel=panel)))
    work = RunWork(config, store, make_view(run=1, spec=spec), site=0, view_run=lambda run: make_view())
    assert work.task.describe()["features"] == 2
