"""Every merge method against the slow oracle, with tensors in blocks of different sizes; and the properties that hold for any models."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_ray.merging.blocks import CHUNK, ArrayBlocks
from fusion_ray.merging.changes import measure_changes
from fusion_ray.merging.methods import METHODS
from fusion_ray.merging.parameters import METHOD_PARAMETERS, complete_parameters
from fusion_ray.merging.sampling import stream_keys, uniform
from fusion_ray.merging.sce import sce
from fusion_ray.merging.varm import varm_weights
from tests.reference import merging as oracle
from tests.unit.merging import properties
from tests.unit.merging.properties import CASES, PROPERTIES, Array, Case

NAME = "m.layers.0.w"


def blocks_of(method, parameters, base, targets, step=1 << 16):
    if METHODS[method].whole_rows(parameters):
        step = math.lcm(CHUNK, targets[0].shape[-1])
    return ArrayBlocks(base, targets, NAME, step)


def merged_by(method, base, targets, parameters, *, step=1 << 16):
    """(merged, weights) of one tensor."""
    if method == "multislerp":
        parameters = {**parameters, "has_base": base is not None}
    given_base = base is not None and METHOD_PARAMETERS[method].base != "none"
    complete = {
        p.name: parameters.get(p.name, p.default if not p.per_model else (p.default,) * len(targets))
        for p in METHOD_PARAMETERS[method].parameters
    }
    complete = {name: value for name, value in complete.items() if value not in (None, (None,) * len(targets))}
    complete |= {name: value for name, value in parameters.items() if name == "has_base"}
    blocks = blocks_of(method, complete, base if given_base else None, targets, step)
    weights = METHODS[method].weights({NAME: measure_changes(blocks)}, complete)
    ready = METHODS[method].prepare(blocks, weights[NAME], **complete)
    parts = []
    for block in blocks:
        out = np.full(block.size, np.nan, np.float32)
        ready.apply(block, out)
        parts.append(out)
    return np.concatenate(parts).reshape(targets[0].shape), ready.weights


def merge(method: str, base: Array | None, targets: list[Array], parameters: dict[str, object]) -> Array:
    return merged_by(method, base, targets, parameters)[0]


def expected_by(method, base, targets, parameters):
    uniforms = None
    if method in oracle.RANDOM:
        keys = stream_keys(0, NAME, len(targets))
        uniforms = np.stack([uniform(int(key), 0, targets[0].size).reshape(targets[0].shape) for key in keys])
    return oracle.merge(method, base, targets, uniforms=uniforms, **parameters)


def random_models(seed, *, shape=(37, 81), targets=3, scale=0.02):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=shape).astype(np.float32)
    moved = [(base + rng.normal(size=shape) * scale * (j + 1)).astype(np.float32) for j in range(targets)]
    moved[0][:3] = base[:3]  # some rows that a target did not move
    return base, moved


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("targets", [1, 2, 3, 5])
def test_equals_the_equation(case: Case, targets: int) -> None:
    if not case.least <= targets <= (METHOD_PARAMETERS[case.method].most or 5):
        pytest.skip(f"{case.method} does not take {targets} targets")
    base, models = random_models(targets, targets=targets)
    parameters = case.parameters(targets)
    given_base = base if case.base else None
    got = merge(case.method, given_base, models, parameters)
    # The task vectors are float32, as the models hold them; the oracle's are wide.
    np.testing.assert_allclose(got, expected_by(case.method, given_base, models, parameters), atol=2e-6, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_for_any_size_of_block(case: Case) -> None:
    count = min(case.most, 3)
    base, models = random_models(7, shape=(7, 1500), targets=count)
    parameters = case.parameters(count)
    whole, weights = merged_by(case.method, base if case.base else None, models, parameters)
    for step in (CHUNK, 3 * CHUNK):
        got, got_weights = merged_by(case.method, base if case.base else None, models, parameters, step=step)
        assert np.array_equal(got, whole)
        assert got_weights == weights


@pytest.mark.parametrize(("case", "name"), properties.pairs())
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_properties(case: Case, name: str, data: st.DataObject) -> None:
    base, targets = data.draw(properties.models(case))
    PROPERTIES[name](merge, case, base, targets)


ON_THE_SPHERE = next(case for case in CASES if case.method == "slerp")


@settings(max_examples=30, deadline=None)
@given(drawn=properties.models(ON_THE_SPHERE))
def test_two_on_the_sphere(drawn: tuple[Array, list[Array]]) -> None:
    base, (target,) = drawn
    cosine = float((base * target).sum()) / float(np.linalg.norm(base) * np.linalg.norm(target))
    if cosine < 0.999:  # beyond, slerp is linear
        properties.two_on_the_sphere(merge, base, target)
    properties.slerp_ends_and_turns_round(merge, base, target)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_weights_are_shares(data: st.DataObject) -> None:
    base, targets = data.draw(properties.models(CASES[0]))
    same = [targets[0]] * len(targets)
    settings_of = [("sce", {"variant": v, "select_topk": 0.5}) for v in ("paper", "fusechat_release", "mergekit")]
    settings_of += [("varm", {"granularity": g, "temperature": t}) for g in ("matrix", "layer") for t in (None, 0.5)]
    for models, equal in ((targets, False), (same, True), ([base] * len(targets), True)):
        for method, parameters in settings_of:
            _, weights = merged_by(method, base, models, parameters)
            properties.good_weights(list(weights), equal=equal)
    for method, parameters in settings_of:
        forwards, backwards = (merged_by(method, base, order, parameters)[1] for order in (targets, targets[::-1]))
        np.testing.assert_allclose(forwards, backwards[::-1], rtol=1e-12)


def test_every_method_has_cases() -> None:
    assert {case.method for case in CASES} | {"passthrough"} == METHODS.keys() == METHOD_PARAMETERS.keys()


def test_passthrough_is_the_one_model() -> None:
    _, (model, other) = random_models(1, targets=2)
    assert np.array_equal(merge("passthrough", None, [model], {}), model)
    with pytest.raises(ValueError, match="passthrough takes one model a tensor; 2 are given"):
        merge("passthrough", None, [model, other], {})


def test_sce_ties_at_the_threshold_go_to_the_lowest_positions():
    base = np.zeros(10, np.float32)
    first = np.array([0, 1, 1, 1, 1, 3, 1, 1, 1, 0], np.float32)
    got, weights = merged_by("sce", base, [first, base], {"select_topk": 0.5})
    assert got.tolist() == [0, 1, 1, 1, 0, 3, 0, 0, 0, 0]  # int(0.5 * 8) = 4: the 3 and the first three ones
    assert weights == (1.0, 0.0)


@pytest.mark.parametrize("step", [CHUNK, 1 << 16])
def test_ties_at_a_threshold_over_several_blocks(step):
    """The ties that are kept are the first of the tensor, whatever block they lie in."""
    base = np.zeros(5 * CHUNK, np.float32)
    target = np.tile(np.array([1, -1], np.float32), base.size // 2)
    for method, parameters, kept in (
        ("ties", {"weight": (1.0,), "density": (0.5,)}, base.size // 2),
        ("sce", {"select_topk": 0.3}, int(0.3 * base.size)),
    ):
        models = [target] if method == "ties" else [target, base]
        got, _ = merged_by(method, base, models, parameters, step=step)
        assert np.count_nonzero(got) == kept
        assert np.array_equal(got[:kept], target[:kept])


def test_sce_counts_the_variances_that_float32_cannot_hold():
    base = np.zeros(4, np.float32)
    tiny = np.array([1e-30, 1e-30, 1.0, 2.0], np.float32)
    got, _ = merged_by("sce", base, [tiny, base], {"select_topk": 0.75})
    assert got.tolist() == [np.float32(1e-30), 0, 1, 2]


def test_sce_paper_leaves_the_unselected_at_the_base_and_erases_the_minority():
    base = np.array([1.0, 1.0, 1.0, 1.0], np.float32)
    first = np.array([4.0, 1.5, 1.0, 1.0], np.float32)
    second = np.array([-1.0, 1.0, 1.0, 1.25], np.float32)
    got, eta = merged_by("sce", base, [first, second], {"select_topk": 0.34})
    assert eta == (9 / 13, 4 / 13)  # deltas 3 and -2 at the one selected position
    np.testing.assert_allclose(got, [1 + 3 * 9 / 13, 1, 1, 1], rtol=1e-6)


def test_varm_weights_by_unit():
    sizes = {"m.embed.weight": 2, "m.layers.0.a.weight": 4, "m.layers.0.b.weight": 2, "m.layers.10.a.weight": 2}
    changes = {}
    tensors = {}
    for seed, (name, size) in enumerate(sizes.items()):
        base, targets = random_models(seed, shape=(size + 3, 2), targets=2)
        tensors[name] = (base, targets)
        changes[name] = measure_changes(ArrayBlocks(base, targets))
    for granularity in ("matrix", "layer", "model"):
        for square in (True, False):
            for temperature in (None, 0.3):
                got = varm_weights(changes, granularity=granularity, square=square, temperature=temperature)
                want = oracle.varm_weights(tensors, granularity, square=square, temperature=temperature)
                for name in tensors:  # the oracle takes differences in float64, the method in float32
                    np.testing.assert_allclose(got[name], want[name], rtol=1e-5)
    layer = varm_weights(changes, granularity="layer")
    assert layer["m.layers.0.a.weight"] == layer["m.layers.0.b.weight"] != layer["m.layers.10.a.weight"]


def test_changes_find_the_model_with_non_finite_values():
    base = np.zeros(5, np.float32)
    bad = np.array([0.0, 1.0, math.inf, -math.inf, math.nan], np.float32)
    changes = measure_changes(ArrayBlocks(base, [base + 1, bad]))
    assert changes.finite == (True, True, False)
    assert changes.squares[0] == 5
    assert math.isnan(changes.squares[1])
    assert changes.moved == (5, 4)


def test_changes_of_targets_taken_apart_and_joined():
    base, targets = random_models(3, targets=3)
    whole = measure_changes(ArrayBlocks(base, targets))
    parts = [measure_changes(ArrayBlocks(base, [target])) for target in targets]
    assert parts[0] + parts[1] + parts[2] == whole
    assert [whole.of(target) for target in range(3)] == parts


def test_random_numbers_belong_to_the_element():
    (key, other), again = stream_keys(0, "a", 2), stream_keys(1, "a", 1)
    numbers = uniform(int(key), 0, 100_000)
    assert np.array_equal(numbers[500:600], uniform(int(key), 500, 100))
    assert len({int(key), int(other), int(again[0])}) == 3
    assert abs(numbers.mean() - 0.5) < 0.005
    assert np.abs(np.histogram(numbers, 10, (0, 1))[0] / 10_000 - 1).max() < 0.05
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01


def test_bad_parameters():
    base, targets = random_models(0, targets=2)
    with pytest.raises(ValueError, match="add up to zero"):
        merge("linear", None, targets, {"weight": (1.0, -1.0)})
    with pytest.raises(ValueError, match="sce variant 'papre'"):
        merge("sce", base, targets, {"variant": "papre"})
    with pytest.raises(ValueError, match="granularity 'row'"):
        merge("varm", base, targets, {"granularity": "row"})
    with pytest.raises(ValueError, match="slerp goes between two models"):
        merge("slerp", base, targets, {"t": 0.5})
    with pytest.raises(ValueError, match="density - epsilon above 0"):
        merge("della", base, targets, {"weight": (1.0, 1.0), "density": (0.1, 0.1), "epsilon": (0.2, 0.2)})
    with pytest.raises(ValueError, match="needs `weight`"):
        complete_parameters("task_arithmetic", {}, targets=2)
    with pytest.raises(ValueError, match="a block of 1000 elements: give a multiple of 1024"):
        ArrayBlocks(base, targets, step=1000)


@pytest.mark.parametrize("variant", ["paper", "mergekit", "fusechat_release"])
@pytest.mark.parametrize("select_topk", [0.05, 0.2, 0.21, 0.5])
def test_sce_is_the_same_whatever_it_has_room_to_keep(variant: str, select_topk: float) -> None:
    """Of some chunks what was selected fits over the ranks, of others it does not; many ranks are equal, so ties run out in the middle."""
    rng = np.random.default_rng(5)
    base = rng.standard_normal(7 * 1024 + 300).astype(np.float32)
    steps = rng.integers(-3, 4, (3, base.size)) * np.linspace(0, 1, base.size).round(1)
    targets = [(base + 0.125 * step).astype(np.float32) for step in steps]
    outcomes = []
    for spare in (1 << 20, 0):
        blocks = ArrayBlocks(base, targets, spare=spare, step=2048)
        ready = sce(blocks, variant=variant, select_topk=select_topk)
        outs = []
        for block in blocks:
            out = np.empty(block.size, np.float32)
            ready.apply(block, out)
            outs.append(out)
        outcomes.append((ready.weights, np.concatenate(outs)))
    assert outcomes[0][0] == outcomes[1][0]
    np.testing.assert_array_equal(outcomes[0][1], outcomes[1][1])
    assert variant == "fusechat_release" or 0 < np.count_nonzero(outcomes[0][1] != base) <= select_topk * base.size
