"""The statistics run of a benchmark's sites, without chain and store."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from swarmchain.agreement import compute_statistics
from swarmchain.certify import Arrays
from swarmchain.checkpoint import allocate_tensors
from swarmchain.config import SiteCard
from swarmchain.layouts import checkpoint_layout
from swarmchain.merge import Input, compute_norm, sum_statistics
from swarmchain.planning import plan_statistics
from swarmchain.selection import Cells, select_cells
from swarmchain.spec import StatisticsSpec


def sum_up(found: Mapping[str, Cells], **options: Any) -> tuple[StatisticsSpec, Arrays, Any]:
    """The sites' sums, by their cells: spec and checkpoint of the run, and what stands for its record on chain.

    `options` are those of `plan_statistics`.
    """
    cards = [SiteCard(name=site, address="0x" + "1" * 40, features=cells.features,
                      labels=tuple(sorted(set(cells.labels.tolist())))) for site, cells in found.items()]
    spec = plan_statistics(cards, name="statistics", sites_to_start=len(cards), **options)
    inputs = []
    for i, cells in enumerate(found.values()):
        data = select_cells(cells, spec)
        sums = compute_statistics(data, spec)
        inputs.append(Input(i, len(data.train), sums, compute_norm(sums)))
    _, total = allocate_tensors(checkpoint_layout(spec))
    sum_statistics(inputs, into=total)
    return spec, total, SimpleNamespace(run=1, spec="0" * 64, checkpoint="0" * 64)
