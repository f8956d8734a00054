"""The methods on a torch device against the compiled loops, to the bit: same merged numbers, same weights, same statistics. On CUDA too, where there is one."""

import math

import numpy as np
import pytest
import torch

from fusion_ray.merging.blocks import CHUNK, ArrayBlocks
from fusion_ray.merging.changes import measure_changes
from fusion_ray.merging.gram import gram_matrix
from fusion_ray.merging.methods import METHODS
from fusion_ray.merging.on_torch import selection, sums
from fusion_ray.merging.on_torch.blocks import TorchBlocks
from fusion_ray.merging.on_torch.methods import TORCH_METHODS
from fusion_ray.merging.on_torch.sampling import random_bits
from fusion_ray.merging.parameters import METHOD_PARAMETERS
from fusion_ray.merging.sampling import BITS, stream_keys, uniform
from tests.unit.merging.properties import CASES, Case

NAME = "m.layers.0.w"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def on(device, base, models, *, whole_rows=False, most=2 * CHUNK):
    """Small pieces, so that a tensor has several."""
    first, *others = (torch.from_numpy(each.reshape(-1)).to(device) for each in (base, *models))
    return TorchBlocks(first, others, NAME, base.shape[-1], whole_rows, most)


def complete(case, targets):
    takes, given = METHOD_PARAMETERS[case.method], case.parameters(targets)
    default = {p.name: (p.default,) * targets if p.per_model else p.default for p in takes.parameters}
    found = {name: value for name, value in {**default, **given}.items() if value is not None}
    return found | ({"has_base": case.base} if takes.base == "optional" else {})


def both(case, base, models, device):
    """(merged, weights) by the compiled loops and on the device."""
    parameters = complete(case, len(models))
    method = METHODS[case.method]
    rows = method.whole_rows(parameters)
    step = math.lcm(CHUNK, base.shape[-1]) if rows else 4 * CHUNK
    ours = ArrayBlocks(base, models, NAME, step)
    weights = method.weights({NAME: measure_changes(ours)}, parameters)[NAME]
    ready = method.prepare(ours, weights, **parameters)
    expected = np.full(base.size, np.nan, np.float32)
    for block in ours:
        ready.apply(block, expected[block.start : block.start + block.size])
    theirs = on(device, base, models, whole_rows=rows)
    there = TORCH_METHODS[case.method](theirs, weights, **parameters)
    got = torch.cat([there.apply(piece) for piece in theirs]).cpu().numpy()
    return (got, there.weights), (expected, ready.weights)


def same_bits(got, expected):
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


def random_models(seed, shape, targets, *, ties):
    """With `ties` of few different numbers, as models in bfloat16 have them: the threshold of a selection is met often."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=shape)
    moves = [rng.normal(size=shape) * 0.02 * (j + 1) for j in range(targets)]
    if ties:
        base, moves = np.round(base * 8) / 8, [np.round(move * 200) / 64 for move in moves]
    moved = [(base + move).astype(np.float32) for move in moves]
    base = base.astype(np.float32)
    moved[0].reshape(-1)[:333] = base.reshape(-1)[:333]  # not moved
    return base, moved


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("ties", [False, True], ids=["all differ", "ties"])
def test_same_bits_as_the_compiled_loops(case: Case, ties: bool, device: torch.device) -> None:
    most = METHOD_PARAMETERS[case.method].most or 4
    for seed, (shape, targets) in enumerate([((37, 181), 3), ((5, 1024), 2), ((6001,), 4), ((1, 1), 2), ((3, 1), 1)]):
        count = max(case.least, min(targets, most))
        base, models = random_models(seed, shape, count, ties=ties)
        got, expected = both(case, base, models, device)
        same_bits(got[0], expected[0])
        assert got[1] == expected[1]


def test_every_method_is_there() -> None:
    assert TORCH_METHODS.keys() == METHODS.keys()
    with pytest.raises(ValueError, match="slerp goes between two models"):
        TORCH_METHODS["slerp"](on("cpu", *random_models(0, (4, 5), 2, ties=False)), None, t=0.5)


def test_passthrough_and_a_number_that_float32_does_not_hold(device):
    base, (model,) = random_models(1, (40, 81), 1, ties=False)
    blocks = on(device, base, [model])
    same_bits(torch.cat([TORCH_METHODS["passthrough"](blocks, None).apply(p) for p in blocks]).cpu().numpy(), model.reshape(-1))  # fmt: skip
    third = Case("task_arithmetic", frozenset(), {"scale": 0.7}, {"weight": (1 / 3, 0.1)})
    got, expected = both(third, base, [model, base], device)
    same_bits(got[0], expected[0])


@pytest.mark.parametrize("shape", [(3, 700), (5000,), (1,)])
def test_statistics_and_inner_products(shape, device):
    base, models = random_models(2, shape, 3, ties=False)
    ours, theirs = ArrayBlocks(base, models, NAME), on(device, base, models)
    assert sums.measure_changes(theirs) == measure_changes(ours)
    for of in ("targets", "deltas", "base and targets"):
        assert np.array_equal(sums.gram_matrix(theirs, of=of), gram_matrix(ours, of=of))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_are_found_where_they_are(value):
    base, models = random_models(3, (3, 700), 2, ties=False)
    models[1][2, 5] = value
    assert sums.measure_changes(on("cpu", base, models)).finite == (True, True, False)


def test_random_numbers_of_an_element(device):
    for key in stream_keys(7, NAME, 5).tolist():
        bits = torch.cat([random_bits(key, 0, 3000, device), random_bits(key, 3000, 2001, device)]).cpu().numpy()
        assert np.array_equal(bits / (1 << BITS), uniform(key, 0, 5001))
    assert np.array_equal(random_bits(3, 1 << 40, 4, device).cpu().numpy() / (1 << BITS), uniform(3, 1 << 40, 4))


@pytest.mark.parametrize("count", [0, 1, 2, 6, 7, 11, 12])
def test_selection_takes_ties_from_the_lowest_positions(count, device):
    numbers = np.array([1, 0, 3, 2, 3, 3, 2, 0, 2**-149, 2, 3, 3e38], np.float32)
    chosen = sorted(sorted(range(12), key=lambda place: (-numbers[place], place))[:count])
    ranks = selection.rank_magnitudes(torch.from_numpy(-numbers).to(device))
    selected = selection.select_top(ranks, count)
    for step in (1, 5, 12):
        masks = [selected.mask(ranks[start : start + step], start) for start in range(0, 12, step)]
        assert torch.cat(masks).nonzero()[:, 0].tolist() == chosen
