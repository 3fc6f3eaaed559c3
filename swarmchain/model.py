"""The network: a perceptron from a panel of features to labels; those for bags of cells are in `bags`.

Legend: N cells, F features of the panel, H hidden units, C labels. Parameters and buffers carry
the names of `layouts.state_layout`: `layers.<i>.weight` [out, in], `layers.<i>.bias` [out], `norms.<i>.…` [out].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from swarmchain.bags import SetNetwork, stack_layers
from swarmchain.errors import DataError, SpecError
from swarmchain.layouts import state_layout
from swarmchain.protocol import derive_seed
from swarmchain.spec import DonorSpec, Model, TrainedSpec

Arrays = Mapping[str, npt.NDArray[Any]]


class Perceptron(nn.Module):
    """[N, F] → [N, C]: linear layers, and (normalisation,) ReLU and dropout between them.

    With `mask` the first layer has 2 · F inputs: the values, and which of them are there. A standardised value of
    exactly 0 is one that is not (`agreement.standardize`); a value that is there hardly ever falls on the mean.
    """

    def __init__(self, widths: list[int], *, dropout: float, batch_norm: bool = False, mask: bool = False) -> None:
        super().__init__()
        self.mask = mask
        self.layers = stack_layers(widths)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) if batch_norm else nn.Identity() for width in widths[1:-1])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, C] of standardised cells [N, F]."""
        if self.mask:
            x = torch.cat([x, (x != 0).to(x.dtype)], dim=1)  # [N, 2 · F]
        for i, norm in enumerate(self.norms):  # a slice of a ModuleList is a new module, which takes as long as a layer
            x = self.dropout(torch.relu(norm(self.layers[i](x))))  # [N, H]
        logits: torch.Tensor = self.layers[-1](x)
        return logits


def build_model(spec: TrainedSpec, *, features: int | None = None) -> Perceptron | SetNetwork:
    """The spec's network with whatever weights lie in memory; load some before use.

    `features` is how many it is for, where those are not all of the panel.
    """
    model, width = spec.model, features or len(spec.panel.features)
    if not isinstance(model, Model):
        return SetNetwork(model, width, len(spec.labels))
    widths = [width * (1 + model.mask), *model.hidden, len(spec.labels)]
    return Perceptron(widths, dropout=model.dropout, batch_norm=model.batch_norm, mask=model.mask)


def load_model(spec: TrainedSpec, state: Arrays) -> Perceptron | SetNetwork:
    """The spec's network with these weights."""
    model = build_model(spec)
    load_state(model, state)
    return model


def load_state(model: nn.Module, state: Arrays) -> None:
    """Set every parameter and buffer of `model` from arrays of the same names; other arrays are ignored."""
    for name, tensor in model.state_dict().items():
        if tensor.device.type == "cpu":
            np.copyto(tensor.numpy(), state[name])  # shares the tensor's memory
        else:
            tensor.copy_(torch.tensor(state[name]))


def read_state(model: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Copies of all parameters and buffers, by name."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in model.state_dict().items()}


def draw_state(spec: TrainedSpec) -> dict[str, npt.NDArray[Any]]:
    """Weights of a seed checkpoint: uniform in ±√(6 / inputs) (He et al. 2015, eq. 10), biases 0.

    Normalisation layers start with weight 1, bias 0, mean 0 and variance 1.

    Drawn by numpy from the spec's seed. Whoever proposes a run draws once; the checkpoint then travels as a blob.
    """
    generator = np.random.default_rng(derive_seed("seed checkpoint", spec.training.seed))
    parameters: dict[str, npt.NDArray[Any]] = {}
    for name, (dtype, shape) in state_layout(spec).items():
        if name.startswith("norms."):
            start = 1 if name.endswith(("weight", "running_var")) else 0
            parameters[name] = np.full(shape, start, dtype=dtype)
            continue
        bound = np.sqrt(6.0 / shape[1]) if len(shape) == 2 else 0.0
        parameters[name] = generator.uniform(-bound, bound, size=shape).astype(np.float32)
    return parameters


def compute_logits(model: nn.Module, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Logits [N, C] of standardised cells [N, F], or [B, C] of bags [B, K, F]."""
    model.eval()
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = model(torch.tensor(x)).numpy()
    return logits


def predict_probabilities(model: nn.Module, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Class probabilities [N, C] of standardised cells [N, F], or [B, C] of bags [B, K, F]."""
    return predict_tensor(model, torch.tensor(x))


def predict_tensor(model: nn.Module, x: torch.Tensor) -> npt.NDArray[np.float32]:
    """`predict_probabilities` of a tensor, which is not copied."""
    model.eval()
    with torch.no_grad():
        probabilities: npt.NDArray[np.float32] = torch.softmax(model(x), dim=1).numpy()
    return probabilities


def compute_attention(state: Arrays, bag: npt.NDArray[np.float32], spec: DonorSpec) -> npt.NDArray[np.float32]:
    """How much each cell counts for the call of its sample, [N]; sums to 1. `bag` is one sample's [N, F], standardised.

    Raises
    ------
    SpecError
        If the run's model has no attention.
    DataError
        If the bag is empty.
    """
    model = build_model(spec)
    if not isinstance(model, SetNetwork) or model.attention is None:
        raise SpecError(f"a model of kind {spec.model.kind} has no attention",
                        hint="train one with `swarmchain run new donor --model attention`")
    if len(bag) == 0:
        raise DataError("an empty bag: the sample has no cells", hint="leave the sample out")
    load_state(model, state)
    model.eval()
    with torch.no_grad():
        weights: npt.NDArray[np.float32] = model.attention(model.encode(torch.tensor(bag)[None]))[0].numpy()
    return weights


def sum_attention(weights: npt.NDArray[np.float32], kinds: npt.NDArray[np.str_]) -> dict[str, float]:
    """Attention by kind of cell, the largest first: which cells carried the call. Both are [N]."""
    totals = {str(kind): float(weights[kinds == kind].sum(dtype=np.float64)) for kind in np.unique(kinds)}
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def predict_logits(spec: TrainedSpec, state: Arrays, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Logits [N, C] of standardised cells [N, F] by the spec's network with these weights."""
    return compute_logits(load_model(spec, state), x)
