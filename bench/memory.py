"""What a million cells cost a site: CPU time and peak memory of loading them for a run.

    python bench/memory.py [--file H5AD] [--sites 16] [--json] [--write]

The file is cytof_multicenter.h5ad (929,685 cells × 8 markers) in the folder of real data (SWARMCHAIN_DATA). Each site
is a process of its own, which reads site.toml and calls `load_site_data` for a statistics spec on all markers, and then
sums them, as an agent does: one site for each sample, by [data.where], and one that holds all of it. `peak_mb` is the
child's largest resident memory (getrusage), interpreter and libraries included; `base_mb` is that of a child that only
imports. `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tables import replace_table

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("SWARMCHAIN_DATA", ROOT.parent / "shared" / "data"))
LABELS = ("B cell", "CD4+ T cell", "CD8+ T cell", "Monocyte", "ungated")
MARKERS = ("CCR6", "CD20", "CD45", "CD14", "CD16", "CD8", "CD3", "CD4")

CHILD = """
import json, resource, sys, time
from pathlib import Path
from swarmchain.config import read_site_config
from swarmchain.agreement import compute_statistics
from swarmchain.data import load_site_data
from swarmchain.spec import parse_spec
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
import anndata, h5py, pandas, scipy.sparse
base, started = peak(), time.process_time()
cells = 0
if len(sys.argv) > 2:
    spec = parse_spec(Path(sys.argv[2]).read_bytes())
    data = load_site_data(read_site_config(Path(sys.argv[1])), spec)
    compute_statistics(data, spec)
    cells = len(data.y)
print(json.dumps({"cells": cells, "cpu_s": time.process_time() - started, "base_mb": base, "peak_mb": peak()}))
"""


def measure(site_toml: Path, spec: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, str(site_toml), str(spec)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def measure_all(file: Path, sites: int) -> list[dict[str, Any]]:
    from swarmchain.config import write_file
    from swarmchain.site_text import render_site_toml
    from swarmchain.spec import Limits, Normalization, Panel, StatisticsSpec, encode_spec

    spec = StatisticsSpec(name="memory", panel=Panel(features=MARKERS), labels=LABELS,
                          normalization=Normalization(kind="arcsinh"), limits=Limits(rounds=1, sites_to_start=1))
    rows = []
    with tempfile.TemporaryDirectory(prefix="swarmchain-bench-") as name:
        folder = Path(name)
        write_file(folder / "spec.json", encode_spec(spec))
        for sample in [None, *(f"S{i + 1:02d}" for i in range(sites))]:
            text = render_site_toml(name=sample or "all", rpc_url="http://none", deployment="none", store="none",
                                    data=str(file), label_column="cell_type")
            if sample is not None:
                text += f'\n[data.where]\nsample = "{sample}"\n'
            write_file(folder / "site.toml", text.encode())
            rows.append({"site": sample or "all in one", **measure(folder / "site.toml", folder / "spec.json")})
    return rows


def format_table(rows: list[dict[str, Any]]) -> str:
    whole, parts = rows[0], rows[1:]
    lines = ["| site | cells | CPU seconds | peak memory, MB | of which imports |", "|---|---|---|---|---|",
             f"| all in one | {whole['cells']:,} | {whole['cpu_s']:.1f} | {whole['peak_mb']:.0f} | "
             f"{whole['base_mb']:.0f} |"]
    if parts:
        worst = max(parts, key=lambda row: row["peak_mb"])
        lines.append(f"| {len(parts)} sites, the largest | {worst['cells']:,} | {worst['cpu_s']:.1f} | "
                     f"{worst['peak_mb']:.0f} | {worst['base_mb']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=DATA / "cytof_multicenter" / "cytof_multicenter.h5ad")
    parser.add_argument("--sites", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    if not options.file.exists():
        print(f"{options.file} is not there: nothing measured (SWARMCHAIN_DATA names the folder of real data)")
        return
    rows = measure_all(options.file.resolve(), options.sites)
    if options.json:
        print(json.dumps(rows))
        return
    print(format_table(rows), end="")
    if options.write:
        replace_table("memory", format_table(rows))


if __name__ == "__main__":
    main()
