"""A network of one's own in a swarm: a denoising autoencoder that three hospitals train on their own PBMCs.

    python own_network.py propose north/site.toml             prints the number of the run
    python own_network.py train north/site.toml cells/North.h5ad 1

Nothing here is swarmchain's own but `Swarm`: network, data and training are yours to change. Each site runs the same
file; its SHA-256 stands in the run's law.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anndata
import numpy as np
import torch
from torch import nn

from swarmchain.api import Round, Swarm

FEATURES = 765


def build() -> nn.Module:
    """Cells [N, 765] → 16 numbers → cells [N, 765]."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 64), nn.ReLU(),
                         nn.Linear(64, FEATURES))


def load(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-normalised cells of one site: four fifths to train on, the rest to score with."""
    x = torch.from_numpy(anndata.read_h5ad(path).to_df().to_numpy(dtype=np.float32))
    return x[np.arange(len(x)) % 5 > 0], x[::5]


def train(model: nn.Module, cells: torch.Tensor, round_: Round) -> None:
    """Some steps of your own; the swarm does not look into them."""
    generator = torch.Generator().manual_seed(round_.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=float(round_.settings["lr"]))
    for _ in range(int(round_.settings["steps"])):
        rows = torch.randint(len(cells), (64,), generator=generator)
        kept = torch.rand((64, FEATURES), generator=generator) > 0.2
        loss = nn.functional.mse_loss(model(cells[rows] * kept), cells[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def explain(model: nn.Module, cells: torch.Tensor) -> float:
    """Share of the variance that the 16 numbers keep, at least 0: what the site votes as its score."""
    with torch.no_grad():
        rest = (model(cells) - cells).square().sum() / (cells - cells.mean(0)).square().sum()
    return max(0.0, 1.0 - float(rest))


def main() -> None:
    """See above."""
    torch.set_num_threads(1)
    model, this = build(), Path(__file__)
    if sys.argv[1] == "propose":
        with Swarm(sys.argv[2]) as swarm:
            print(swarm.propose(model, name="denoising autoencoder", rounds=6, sites=3,
                                settings={"steps": 40, "lr": 1e-3}, code=this))
        return
    run, (cells, held_out) = int(sys.argv[4]), load(Path(sys.argv[3]))
    with Swarm(sys.argv[2]) as swarm:
        swarm.join(run, model, code=this)
        for round_ in swarm.rounds(run, model, samples=len(cells), score=lambda m: explain(m, held_out), code=this):
            train(model, cells, round_)
            print(f"round {round_.number} of {round_.last}: keeps {explain(model, held_out):.3f} after own training")
    print(f"the swarm's keeps {explain(model, held_out):.3f} of the variance of this site's held-out cells")


if __name__ == "__main__":
    main()
