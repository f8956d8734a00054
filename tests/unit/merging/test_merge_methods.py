"""Every merge method against the slow oracle, with tensors in blocks of different sizes; and the properties that hold for any models."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusion_ray.merging.blocks import CHUNK, Block, split
from fusion_ray.merging.changes import measure_changes
from fusion_ray.merging.methods import METHODS
from fusion_ray.merging.parameters import METHOD_PARAMETERS, check_parameters, complete_parameters
from fusion_ray.merging.varm import varm_weights
from tests.reference import merging as oracle

CASES = [
    ("varm", {"granularity": "matrix"}),
    ("varm", {"granularity": "matrix", "square": False}),
    ("varm", {"granularity": "layer"}),
    ("varm", {"granularity": "model"}),
    ("varm", {"granularity": "parameter"}),
    ("varm", {"granularity": "parameter", "square": False}),
    *(("sce", {"variant": v, "select_topk": t}) for v in ("paper", "fusechat_release", "mergekit") for t in (0.1, 0.5, 1.0)),
    ("linear", {}),
    ("task_arithmetic", {"weight": 0.3}),
]  # fmt: skip
IDS = [f"{method}-{'-'.join(map(str, parameters.values()))}" for method, parameters in CASES]


def merged_by(method, parameters, pivot, targets, *, size=1 << 18):
    """(merged, weights) of one tensor."""
    blocks = split(torch.from_numpy(pivot), [torch.from_numpy(target) for target in targets], size=size)
    parameters = complete_parameters(method, parameters, targets=len(targets))
    weights = METHODS[method].weights({"m.layers.0.w": measure_changes(blocks, targets=len(targets))}, parameters)
    ready = METHODS[method].prepare(blocks, weights["m.layers.0.w"], **parameters)
    return torch.cat([ready.apply(block) for block in blocks]).reshape(pivot.shape).numpy(), ready.weights


def expected_by(method, parameters, pivot, targets):
    if method == "linear":
        return oracle.linear(targets, [1.0] * len(targets))
    if method == "task_arithmetic":
        return oracle.task_arithmetic(pivot, targets, [0.3] * len(targets))
    if method == "sce":
        return oracle.sce(pivot, targets, parameters["select_topk"], parameters["variant"])[0]
    square = parameters.get("square", True)
    if parameters["granularity"] == "parameter":
        return oracle.varm_parameter(pivot, targets, square=square)
    weights = oracle.varm_weights({"w": (pivot, targets)}, "matrix", square=square)["w"]
    return sum(weight * target.astype(np.float64) for weight, target in zip(weights, targets, strict=True))


def random_models(seed, *, shape=(37, 81), targets=3, scale=0.02):
    rng = np.random.default_rng(seed)
    pivot = rng.normal(size=shape).astype(np.float32)
    moved = [(pivot + rng.normal(size=shape) * scale * (j + 1)).astype(np.float32) for j in range(targets)]
    moved[0][:3] = pivot[:3]  # some rows that a target did not move
    return pivot, moved


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=IDS)
@pytest.mark.parametrize("targets", [1, 2, 3, 5])
def test_equals_the_equation(method, parameters, targets):
    pivot, models = random_models(targets, targets=targets)
    got, _ = merged_by(method, parameters, pivot, models)
    np.testing.assert_allclose(got, expected_by(method, parameters, pivot, models), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=IDS)
def test_same_bits_for_any_size_of_block(method, parameters):
    pivot, models = random_models(7, shape=(7, 1500))
    whole, weights = merged_by(method, parameters, pivot, models)
    for size in (CHUNK, 3 * CHUNK):
        got, got_weights = merged_by(method, parameters, pivot, models, size=size)
        assert np.array_equal(got, whole)
        assert got_weights == weights


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=IDS)
def test_same_bits_for_any_number_of_threads(method, parameters):
    pivot, models = random_models(8, shape=(300, 1000))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(merged_by(method, parameters, pivot, models))
    finally:
        torch.set_num_threads(threads)
    for merged, weights in results[1:]:
        assert np.array_equal(merged, results[0][0])
        assert weights == results[0][1]


models_strategy = st.integers(1, 4).flatmap(
    lambda count: arrays(
        np.float32, (count + 1, 6), elements=st.floats(-4, 4, width=32).map(lambda x: np.float32(round(x * 8) / 8))
    )
)


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=IDS)
@settings(max_examples=30, deadline=None)
@given(models=models_strategy)
def test_properties(method, parameters, models):
    pivot, targets = models[0], list(models[1:])
    got, weights = merged_by(method, parameters, pivot, targets)

    if weights is not None and method != "task_arithmetic":
        assert math.fsum(weights) == pytest.approx(1, abs=1e-12)

    still, _ = merged_by(method, parameters, pivot, [pivot] * len(targets))
    if method == "linear":
        np.testing.assert_allclose(still, pivot, rtol=3e-7)
    else:
        assert np.array_equal(still, pivot)  # the pivot unmoved gives the pivot

    whole = parameters.get("select_topk", 1.0) == 1.0 and method != "task_arithmetic"
    if whole:  # merging equal models is the model; a selection by variance finds nothing among equal ones
        equal, equal_weights = merged_by(method, parameters, pivot, [targets[0]] * len(targets))
        np.testing.assert_allclose(equal, targets[0], atol=2e-6)
        assert equal_weights is None or np.allclose(equal_weights, 1 / len(targets))

    permuted, permuted_weights = merged_by(method, parameters, pivot, targets[::-1])
    np.testing.assert_allclose(permuted, got, atol=2e-6)
    if weights is not None:
        np.testing.assert_allclose(permuted_weights, weights[::-1], rtol=1e-12)


def test_sce_ties_at_the_threshold_go_to_the_lowest_positions():
    pivot = np.zeros(10, np.float32)
    first = np.array([0, 1, 1, 1, 1, 3, 1, 1, 1, 0], np.float32)
    got, weights = merged_by("sce", {"select_topk": 0.5}, pivot, [first, pivot])
    assert got.tolist() == [0, 1, 1, 1, 0, 3, 0, 0, 0, 0]  # int(0.5 * 8) = 4: the 3 and the first three ones
    assert weights == (1.0, 0.0)


def test_sce_counts_the_variances_that_float32_cannot_hold():
    pivot = np.zeros(4, np.float32)
    tiny = np.array([1e-30, 1e-30, 1.0, 2.0], np.float32)
    got, _ = merged_by("sce", {"select_topk": 0.75}, pivot, [tiny, pivot])
    assert got.tolist() == [np.float32(1e-30), 0, 1, 2]


def test_sce_paper_leaves_the_unselected_at_the_pivot_and_erases_the_minority():
    pivot = np.array([1.0, 1.0, 1.0, 1.0], np.float32)
    first = np.array([4.0, 1.5, 1.0, 1.0], np.float32)
    second = np.array([-1.0, 1.0, 1.0, 1.25], np.float32)
    got, eta = merged_by("sce", {"select_topk": 0.34}, pivot, [first, second])
    assert eta == (9 / 13, 4 / 13)  # deltas 3 and -2 at the one selected position
    np.testing.assert_allclose(got, [1 + 3 * 9 / 13, 1, 1, 1], rtol=1e-6)


def test_varm_weights_by_unit():
    pivot = {"m.embed.weight": 2, "m.layers.0.a.weight": 4, "m.layers.0.b.weight": 2, "m.layers.10.a.weight": 2}
    changes = {}
    tensors = {}
    for seed, (name, size) in enumerate(pivot.items()):
        base, targets = random_models(seed, shape=(size + 3, 2), targets=2)
        tensors[name] = (base, targets)
        blocks = split(torch.from_numpy(base), [torch.from_numpy(target) for target in targets])
        changes[name] = measure_changes(blocks, targets=2)
    for granularity in ("matrix", "layer", "model"):
        for square in (True, False):
            got = varm_weights(changes, granularity=granularity, square=square)
            want = oracle.varm_weights(tensors, granularity, square=square)
            for name in tensors:  # the oracle takes differences in float64, the method in float32
                np.testing.assert_allclose(got[name], want[name], rtol=1e-6)
    layer = varm_weights(changes, granularity="layer")
    assert layer["m.layers.0.a.weight"] == layer["m.layers.0.b.weight"] != layer["m.layers.10.a.weight"]


def test_changes_find_the_model_with_non_finite_values():
    pivot = torch.zeros(5)
    bad = torch.tensor([0.0, 1.0, math.inf, -math.inf, math.nan])
    changes = measure_changes(split(pivot, [pivot + 1, bad]), targets=2)
    assert changes.finite == (True, True, False)
    assert changes.squares[0] == 5
    assert math.isnan(changes.squares[1])
    assert changes.moved == (5, 4)


def test_deltas_of_a_block():
    block = Block(0, torch.tensor([1.0, 2.0]), (torch.tensor([3.0, 2.0]),))
    assert [delta.tolist() for delta in block.deltas] == [[2.0, 0.0]]


def test_methods_and_their_parameters_agree():
    assert METHODS.keys() == METHOD_PARAMETERS.keys()
    with pytest.raises(ValueError, match="unknown merge method 'vram': did you mean 'varm'"):
        check_parameters("vram", [])
    with pytest.raises(ValueError, match="'sce' takes variant and select_topk, not `granularity`"):
        check_parameters("sce", ["granularity"])
    with pytest.raises(ValueError, match="needs `weight`"):
        complete_parameters("task_arithmetic", {}, targets=2)
    with pytest.raises(ValueError, match="has 3 numbers for 2 targets"):
        complete_parameters("linear", {"weight": [1, 2, 3]}, targets=2)
    with pytest.raises(ValueError, match="add up to zero"):
        merged_by("linear", {"weight": [1, -1]}, *random_models(0, targets=2))
    with pytest.raises(ValueError, match="sce variant 'papre'"):
        merged_by("sce", {"variant": "papre"}, *random_models(0))
    with pytest.raises(ValueError, match="granularity 'row'"):
        merged_by("varm", {"granularity": "row"}, *random_models(0))
