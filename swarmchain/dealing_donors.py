"""Public data of donors, dealt to sites: acute myeloid leukaemia by flow cytometry, and stimulated PBMCs.

Both are read from a folder of the reader's own (their licences do not let them travel with the package) with the files
`flowcap2_aml/population_counts_359.csv.gz`, `flowcap2_aml/population_meta_359.csv`, `splits/flowcap2_aml.csv` and
`kang_ifnb_pbmc/kang_ifnb_8donors.h5ad`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

from swarmchain.dealing import Dealt
from swarmchain.donors import check_donor_split
from swarmchain.errors import DataError
from swarmchain.protocol import derive_seed

AML_FOLDS = 5
KANG_FOLDS = 4
KANG_SITES = 3


def deal_aml(folder: Path, root: Path, fold: int, *, skew: bool = True) -> Dealt:
    """FlowCAP-II (Aghaeepour et al. 2013): one row of 378 population proportions per subject, 43 of 359 with AML.

    A row is a subject; X is the square root of each population's share of all events, which steadies the variance of
    counts. The subjects of `fold` (0 to 4) are held out; the others lie at five sites, evenly or, with `skew`, the
    cases 60/25/10/3/2 %: then a site may be left with controls only, and the run's spec must allow that (`labels_min`
    = 1).

    Raises
    ------
    DataError
        If the files are missing, or are others.
    """
    table = _read_table(root / "splits" / "flowcap2_aml.csv", "subject", "fold", "site_even", "site_skew")
    counts = _read_table(root / "flowcap2_aml" / "population_counts_359.csv.gz").iloc[:, 1:]
    meta = _read_table(root / "flowcap2_aml" / "population_meta_359.csv", "class", "id")
    if len(table) != len(counts) or (meta["class"].to_numpy() != table["class"].to_numpy()).any():
        raise DataError(f"{root}: splits/flowcap2_aml.csv does not fit flowcap2_aml/", hint="both must be of 359 rows")
    shares = counts.iloc[:, 1:].to_numpy(np.float64) / counts.iloc[:, [0]].to_numpy(np.float64)
    data = anndata.AnnData(
        X=np.sqrt(shares).astype(np.float32),
        obs=pd.DataFrame({"diagnosis": table["class"].to_numpy(), "subject": table["subject"].astype(str).to_numpy()},
                         index=[f"subject {s}" for s in table["subject"]]),
        var=pd.DataFrame(index=[str(c) for c in counts.columns[1:]]),
    )
    held = (table["fold"] == fold).to_numpy()
    sites = table["site_skew" if skew else "site_even"].astype(str).to_numpy()
    return _write(folder, data, sites, held, title="AML or not, from blood at five hospitals",
                  dataset=f"FlowCAP-II AML, fold {fold}, {'skewed' if skew else 'even'} cases",
                  label_column="diagnosis", donor_column="subject")


def deal_kang(folder: Path, root: Path, fold: int, *, seed: int = 0) -> Dealt:
    """PBMCs of eight donors, each stimulated with IFN-β and not (Kang et al. 2018): bags of cells, counts.

    A sample is a donor under one condition, and the label is the condition. The seed orders the donors; of four folds,
    each holds out two donors, and the other six lie at three sites, two at each.

    Raises
    ------
    DataError
        If the file is missing, or is another.
    """
    path = root / "kang_ifnb_pbmc" / "kang_ifnb_8donors.h5ad"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks of anndata on old files
            data = anndata.read_h5ad(path)
        obs = data.obs[["condition", "donor", "sample"]].astype(str)
    except (OSError, KeyError) as exc:
        raise DataError(f"cannot read {path}: {exc}", hint="it needs condition, donor and sample in .obs") from exc
    donors = np.random.default_rng(derive_seed("deal donors", seed)).permutation(sorted(obs["donor"].unique()))
    parts = np.array_split(donors, KANG_FOLDS)
    rest = np.concatenate([part for i, part in enumerate(parts) if i != fold])
    home = {donor: f"hospital {i + 1}" for i, part in enumerate(np.array_split(rest, KANG_SITES)) for donor in part}
    home |= {donor: "test" for donor in parts[fold]}
    sites = obs["donor"].map(home).to_numpy()
    data = anndata.AnnData(X=data.X, obs=obs, var=pd.DataFrame(index=data.var_names.astype(str)))
    return _write(folder, data, sites, sites == "test", title="Stimulated or not, from bags of cells",
                  dataset=f"IFN-β PBMC, fold {fold}, donors in the order of seed {seed}",
                  label_column="condition", donor_column="donor", sample_column="sample")


def _write(folder: Path, data: anndata.AnnData, sites: Any, held: Any, *, donor_column: str, **about: Any) -> Dealt:
    """One file per site, and one with what is held out."""
    donors = data.obs[donor_column]
    check_donor_split(donors[~held], donors[held], source=about["dataset"])
    folder.mkdir(parents=True)
    files = {}
    for site in sorted(set(sites[~held].tolist())):
        files[site] = folder / f"{site.replace(' ', '-')}.h5ad"
        data[~held & (sites == site)].copy().write_h5ad(files[site])
    data[held].copy().write_h5ad(folder / "held-out.h5ad")
    return Dealt(files=files, test={"held out": folder / "held-out.h5ad"}, umap={}, donor_column=donor_column, **about)


def _read_table(path: Path, *columns: str) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as exc:
        raise DataError(f"cannot read {path}: {exc}", hint="see the room's description for the files it needs") from exc
    missing = [column for column in columns if column not in table]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}", hint=f"it needs {', '.join(columns)}")
    return table
