"""Small files of cells for tests, and where real ones lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anndata
import pandas as pd
import pytest
from conftest import ROOT

from swarmchain.config import DataConfig
from swarmchain.data import read_cells
from swarmchain.selection import SiteData, select_cells
from swarmchain.spec import Limits, Panel, StatisticsSpec

DATA = Path(os.environ.get("SWARMCHAIN_DATA", ROOT.parent / "shared" / "data"))
LABELS = ("a", "b")


def need(path: str) -> Path:
    if not (DATA / path).exists():
        pytest.skip(f"{path} is not in the folder of real data (SWARMCHAIN_DATA)")
    return DATA / path


def make_spec(features: list[str], labels: tuple[str, ...] = LABELS, **more: Any) -> StatisticsSpec:
    panel = more.pop("panel", None) or Panel(features=tuple(features))
    return StatisticsSpec(name="s", panel=panel, labels=labels, limits=Limits(rounds=1, sites_to_start=1), **more)


def make_table(x: Any, *, features: list[str] | None = None) -> anndata.AnnData:
    cells, width = x.shape
    labels = pd.DataFrame({"cell_type": [LABELS[i % 2] for i in range(cells)]}, index=[f"c{i}" for i in range(cells)])
    return anndata.AnnData(
        X=x, obs=labels, var=pd.DataFrame(index=features or [f"g{i}" for i in range(width)]))


def write(path: Path, x: Any, **more: Any) -> Path:
    data = make_table(x, **more)
    data.write_zarr(path) if path.suffix == ".zarr" else data.write_h5ad(path)
    return path


def load(path: Path, spec: StatisticsSpec, **more: Any) -> SiteData:
    config = DataConfig(path=str(path), label_column="cell_type", **more)
    return select_cells(read_cells(path, config, spec.normalization, panel=spec.panel), spec)
