"""The merge: the same bytes everywhere, right numbers, and what each method does against hostile contributions."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from merges import OUTERS, SHAPES, draw, make_input, make_inputs, make_settings, merge

from swarmchain import kernels
from swarmchain.cli.plans import CODECS as OFFERED_CODECS
from swarmchain.cli.plans import MERGES
from swarmchain.cli.plans import OUTERS as OFFERED_OUTERS
from swarmchain.codec import encode_deltas, read_piece
from swarmchain.errors import CheckpointError, ConfigError, SpecError
from swarmchain.merge import build_network, compute_norm, compute_products, compute_weights, merge_deltas
from swarmchain.merging import CODECS, ClippedMean, Outer
from swarmchain.methods import METHODS, Geometry, Plan, digest_code, find_method
from swarmchain.spool import Spool

SMALL = {"w": (50,)}
# What these merges gave when they were written. A change here is a change of the protocol: `certify.CODE` moves too.
DIGESTS = json.loads((Path(__file__).parent / "merge_digests.json").read_text())


# -- the same bytes


@pytest.mark.parametrize("environment", [
    {"ATEN_CPU_CAPABILITY": "default", "NPY_DISABLE_CPU_FEATURES": "AVX2 AVX512F AVX512_SKX",
     "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "OMP_NUM_THREADS": "1"},
    {"ATEN_CPU_CAPABILITY": "avx2", "NUMBA_CPU_NAME": "haswell", "OMP_NUM_THREADS": "2"},
    {"ATEN_CPU_CAPABILITY": "avx512", "OMP_NUM_THREADS": "2"},
    {"NUMBA_DISABLE_JIT": "1"},
], ids=["scalar", "avx2", "own", "interpreted"])
def test_merge_gives_the_stored_digests_whatever_the_cpu(environment: dict[str, str]) -> None:
    script = Path(__file__).parent / "merges.py"
    # without the compiler every element takes a microsecond: a part of the methods then
    chosen = ["--small"] if "NUMBA_DISABLE_JIT" in environment else []
    done = subprocess.run([sys.executable, "-W", "ignore", str(script), *chosen], capture_output=True, text=True,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == DIGESTS["small" if chosen else "whole"]


def test_kernels_fuse_nothing() -> None:
    for kernel, arguments in ((kernels.add_scaled, (numba.float64[::1], numba.float32[::1], numba.float64)),
                              (kernels.add_products, (numba.float64[::1], numba.float32[::1], numba.float32[::1]))):
        compiled = numba.njit(kernel.py_func)  # anew: of cached code there is nothing to see
        compiled.compile(arguments)
        assembly = "".join(compiled.inspect_asm().values())
        assert "mul" in assembly
        assert "fmadd" not in assembly and "fmla" not in assembly


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8)
@given(order=st.permutations(range(5)), piece=st.integers(1, 5000), codec=st.sampled_from(CODECS))
def test_merge_is_the_same_for_any_order_and_piece(method: str, order: list[int], piece: int, codec: str) -> None:
    shapes = {"a": (40, 31), "b": (3,)}
    inputs = make_inputs(5, codec=codec, shapes=shapes)
    expected, _, shares = merge(inputs, make_settings(method))
    found, _, said = merge([inputs[i] for i in order], make_settings(method), piece=piece)
    assert (found, said) == (expected, shares)


# -- right numbers


@settings(max_examples=25)
@given(numbers=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_norm_is_within_an_ulp_per_lane_of_the_exact(numbers: list[float]) -> None:
    exact = sum(Fraction(x) ** 2 for x in np.array(numbers, np.float32).tolist())
    found = compute_norm({"w": np.array(numbers, np.float32)})
    assert found == pytest.approx(math.sqrt(exact), rel=1e-14)


@settings(max_examples=25)
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4), min_size=1, max_size=9))
def test_mean_is_the_exact_mean_rounded_once_more(rows: list[list[float]]) -> None:
    inputs = [make_input(i, {"w": np.array(row, np.float32)}, samples=1 + i) for i, row in enumerate(rows)]
    weights = compute_weights([item.samples for item in inputs], make_settings("mean"))
    _, merged, _ = merge(inputs, make_settings("mean"))
    for j in range(4):
        exact = sum(Fraction(w) * Fraction(float(row[j])) for w, row in zip(weights, rows, strict=True))
        size = sum(abs(Fraction(w) * Fraction(float(row[j]))) for w, row in zip(weights, rows, strict=True))
        # float64 sums err by n half ulps of the sizes added, the float32 result by half of its own
        assert abs(Fraction(float(merged["w"][j])) - exact) <= abs(exact) * 2**-24 + size * len(rows) * 2**-52 + 2**-149


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 11])
def test_median_is_numpys_for_equal_weights(n: int) -> None:
    inputs = make_inputs(n, shapes=SMALL)
    _, merged, _ = merge(inputs, make_settings("coordinate_median", weighting="equal", weight_max=1.0))
    expected = np.median(np.stack([item.tensors["w"] for item in inputs]).astype(np.float64), axis=0)
    assert np.allclose(merged["w"], expected, rtol=1e-6, atol=0)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(-100, 100, width=32), st.integers(1, 50)), min_size=3, max_size=12),
       st.floats(0, 0.45))
def test_trimmed_mean_keeps_what_lies_between(pairs: list[tuple[float, int]], trim: float) -> None:
    inputs = [make_input(i, {"w": np.array([x], np.float32)}, samples=n) for i, (x, n) in enumerate(pairs)]
    choice = make_settings("trimmed_mean", trim=trim, weighting="samples", weight_max=1.0)
    _, merged, _ = merge(inputs, choice)
    weights = compute_weights([n for _, n in pairs], choice)
    low, high, passed, total, kept = trim, 1 - trim, 0.0, 0.0, 0.0
    for x, w in sorted(zip([p[0] for p in pairs], weights, strict=True)):
        part = max(0.0, min(passed + w, high) - max(passed, low))
        total, kept, passed = total + x * part, kept + part, passed + w
    assert merged["w"][0] == pytest.approx(total / kept, rel=1e-5, abs=1e-4)


def test_geometric_median_is_where_steps_to_all_cancel() -> None:
    inputs = make_inputs(5, shapes=SMALL)
    choice = make_settings("geometric_median", iterations=100)
    _, merged, (shares, _) = merge(inputs, choice)
    weights = compute_weights([item.samples for item in inputs], choice)
    pull = sum(w * (item.tensors["w"] - merged["w"]) / np.linalg.norm(item.tensors["w"] - merged["w"])
               for w, item in zip(weights, inputs, strict=True))
    assert np.linalg.norm(pull) < 1e-4
    assert math.fsum(share.weight for share in shares) == pytest.approx(1)


def test_centered_clipping_is_what_its_steps_say() -> None:
    inputs = make_inputs(5, shapes=SMALL)
    choice = make_settings("centered_clipping", iterations=4)
    _, merged, (_, bound) = merge(inputs, choice)
    centre = np.zeros(50)
    weights = compute_weights([item.samples for item in inputs], choice)
    for _ in range(4):
        apart = [item.tensors["w"].astype(np.float64) - centre for item in inputs]
        centre = centre + sum(w * d * min(1, bound / np.linalg.norm(d)) for w, d in zip(weights, apart, strict=True))
    assert np.allclose(merged["w"], centre, rtol=1e-5, atol=1e-7)


def test_multi_krum_leaves_the_farthest_out() -> None:
    inputs = [make_input(i, {"w": draw(i, (50,)) * np.float32(0.1) + np.float32(1)}) for i in range(4)]
    inputs.append(make_input(4, {"w": np.full(50, -9, np.float32)}))
    _, _, (shares, _) = merge(inputs, make_settings("multi_krum"))
    assert [share.weight > 0 for share in shares] == [True] * 4 + [False]


def test_products_are_those_of_the_deltas() -> None:
    inputs = make_inputs(4)
    rows = [np.concatenate([item.tensors[n].reshape(-1) for n in SHAPES]).astype(np.float64) for item in inputs]
    assert np.allclose(compute_products(inputs), [[a @ b for b in rows] for a in rows], rtol=1e-10)


@pytest.mark.parametrize("kind", OUTERS)
def test_outer_optimisers_move_as_torch_does(kind: str) -> None:
    import torch

    outer = Outer(kind=kind, lr=0.5)
    start = {"w": draw(1, (50,))} | {f"outer.{m}.w": np.zeros(50, np.float32) for m in
                                     {"none": "", "fedadam": "mv"}.get(kind, "m")}
    deltas = [draw(2 + k, (50,)) for k in range(4)]
    ours = dict(start)
    for delta in deltas:
        _, ours, _ = merge([make_input(0, {"w": delta})], make_settings("mean", outer=outer.model_dump()), parent=ours)
    weight = torch.nn.Parameter(torch.tensor(start["w"], dtype=torch.float64))
    m = v = torch.zeros(50, dtype=torch.float64)
    momentum = 0.0 if kind == "none" else 0.9
    sgd = torch.optim.SGD([weight], lr=0.5, momentum=momentum, nesterov=kind == "nesterov")
    for delta in deltas:
        d = torch.tensor(delta, dtype=torch.float64)
        if kind == "fedadam":
            m, v = 0.9 * m + 0.1 * d, 0.99 * v + 0.01 * d * d
            weight.data += 0.5 * m / (v.sqrt() + 1e-3)
        else:
            weight.grad = -d
            sgd.step()
    assert np.allclose(ours["w"], weight.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 13, 16, 31])
def test_network_sorts(n: int) -> None:
    keys = np.random.default_rng(n).integers(-(2**39), 2**39, size=(n, 500))
    expected = np.sort(keys, axis=0)
    kernels.sort_columns(keys, build_network(n))
    assert np.array_equal(keys, expected)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20))
def test_keys_are_ordered_as_the_numbers_are(numbers: list[float]) -> None:
    singles = np.array(numbers, np.float32)
    keys = np.empty(singles.size, np.int64)
    kernels.pack_keys(keys, singles.view(np.int32), 7)
    ordered = singles[np.argsort(keys, kind="stable")]
    assert all(a <= b for a, b in pairwise(ordered))


# -- bounds


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"mean"}))
@pytest.mark.parametrize("scale", [1e3, -1e3, 1e30])
def test_robust_methods_bound_one_hostile_site_of_five(method: str, scale: float) -> None:
    honest = [make_input(i, {"w": draw(i, (50,)) + np.float32(1)}) for i in range(4)]
    hostile = make_input(4, {"w": (draw(4, (50,)) + np.float32(1)) * np.float32(scale)}, samples=10**9)
    choice = make_settings(method, weight_max=0.2)
    _, clean, _ = merge(honest, choice)
    _, moved, _ = merge([*honest, hostile], choice)
    assert np.linalg.norm(moved["w"] - clean["w"]) < 0.75 * np.linalg.norm(clean["w"])


def test_mean_is_moved_by_one_hostile_site() -> None:
    inputs = [make_input(i, {"w": draw(i, (50,))}) for i in range(5)]
    inputs[4] = make_input(4, {"w": draw(4, (50,)) * np.float32(1e3)})
    _, moved, _ = merge(inputs, make_settings("mean"))
    assert np.linalg.norm(moved["w"]) > 100


def test_merge_of_the_largest_numbers_stays_finite() -> None:
    top = np.full(50, np.finfo(np.float32).max, np.float32)
    _, merged, _ = merge([make_input(i, {"w": top}) for i in range(3)], make_settings("mean"), parent={"w": top})
    assert np.isfinite(merged["w"]).all()


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=20), st.sampled_from(["samples", "sqrt_samples", "equal"]))
def test_weights_sum_to_one_and_keep_the_cap(samples: list[int], weighting: str) -> None:
    weights = compute_weights(samples, make_settings("mean", weighting=weighting, weight_max=0.5))
    assert abs(sum(weights) - 1) < 1e-12
    assert max(weights) <= max(0.5, 1 / len(samples)) + 1e-12


# -- codecs


@given(st.lists(st.floats(-2.0**100, 2.0**100, width=32), min_size=1, max_size=30), st.sampled_from(CODECS))
def test_codec_says_what_it_lost(numbers: list[float], codec: str) -> None:
    delta = np.array(numbers, np.float32)
    coded, lost = encode_deltas({"w": delta}, codec)
    decoded = read_piece(coded, "w", 0, delta.size)
    assert np.isfinite(decoded).all() and np.array_equal(lost["w"], delta - decoded)
    if codec == "float32":
        assert np.array_equal(decoded, delta)
    elif codec == "int8":
        assert np.abs(lost["w"]).max() <= np.abs(delta).max() / 127 * 0.51 + 1e-37


def test_error_feedback_sends_what_was_lost_sooner_or_later() -> None:
    delta = {"w": np.array([1.0, 0.003], np.float32)}  # the second is less than half of what a unit stands for
    residual, sent = None, np.zeros(2)
    for _ in range(100):
        coded, residual = encode_deltas(delta, "int8", residual=residual)
        sent += read_piece(coded, "w", 0, 2)
    assert np.allclose(sent, [100, 0.3], atol=0.01)


# -- refusals


def test_command_line_offers_what_the_spec_does() -> None:
    assert set(MERGES) == set(METHODS) and MERGES[0] == ClippedMean().method
    assert OFFERED_CODECS == CODECS and OFFERED_OUTERS == OUTERS == get_args(Outer.model_fields["kind"].annotation)


def test_invalid_merge_of_nothing() -> None:
    with pytest.raises(CheckpointError, match="at least one"):
        merge_deltas({}, [], make_settings("mean"), into={})


def test_invalid_method_that_is_not_installed() -> None:
    with pytest.raises(SpecError, match="not installed"):
        find_method(make_settings("custom", name="nobody's", code="0" * 64))


def test_custom_method_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ("from swarmchain.methods import Plan\n"
              "def first(geometry, settings):\n"
              "    n = len(geometry.norms) + int(settings.settings.get('more', 0))\n"
              "    return Plan([settings.settings['share']] + [0.0] * (n - 1), [1.0] * n)\n")
    (tmp_path / "consortium_merge.py").write_text(source)
    about = tmp_path / "consortium_merge-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: consortium-merge\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[swarmchain.merge_methods]\nfirst = consortium_merge:first\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import consortium_merge

    choice = make_settings("custom", name="first", code=digest_code(consortium_merge.first), settings={"share": 0.5})
    inputs = make_inputs(3, shapes=SMALL)
    _, merged, _ = merge(inputs, choice)
    assert np.array_equal(merged["w"], inputs[0].tensors["w"] * np.float32(0.5))
    wrong = make_settings("custom", name="first", code=choice.code, settings={"share": 0.5, "more": 1})
    with pytest.raises(SpecError, match="for each of 3 sites"):
        merge(inputs, wrong)
    with pytest.raises(SpecError, match="the spec's is"):
        find_method(make_settings("custom", name="first", code="0" * 64))


def test_geometry_asks_for_products_once() -> None:
    asked = []

    def compute() -> list[list[float]]:
        asked.append(1)
        return [[1.0]]

    geometry = Geometry([1.0], [1.0], compute)
    assert geometry.compute_distances([0.0]) == [1.0] and geometry.compute_distances([1.0]) == [0.0] and asked == [1]
    assert isinstance(METHODS["geometric_median"](geometry, make_settings("geometric_median")), Plan)


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20])
def test_spool_slots_keep_what_was_written(tmp_path: Path, memory_bytes: int) -> None:
    spool = Spool(tmp_path / "spool", memory_bytes=memory_bytes)
    for number in range(3):
        spool.get_slot(number, 5000)[:] = bytes([number]) * 5000
    assert [bytes(spool.get_slot(number, 5000)) for number in range(3)] == [bytes([k]) * 5000 for k in range(3)]
    assert len(spool.get_slot(0, 7000)) == 7000
    assert not list(tmp_path.rglob("*")) or [p.name for p in tmp_path.rglob("*")] == ["spool"]


def test_invalid_spool_without_room(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot make room"):
        Spool(tmp_path, memory_bytes=0).get_slot(0, 1 << 55)
