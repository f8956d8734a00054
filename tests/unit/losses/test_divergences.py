"""Sparse divergences against the dense float64 oracle, values with the answer written here, and gradients."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from fusion_ray.losses.divergences import DIVERGENCES, divergence, outcomes

_spec = importlib.util.spec_from_file_location(
    "reference_losses", Path(__file__).parents[2] / "reference" / "losses.py"
)
assert _spec is not None
assert _spec.loader is not None
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

N, K, V = 7, 4, 19


def case(seed: int, *, unknown: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student logits (N, V), target ids (N, K), target logprobs (N, K) that leave a tail."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=generator, dtype=torch.float64) * 2
    teacher = torch.log_softmax(torch.randn(N, V, generator=generator, dtype=torch.float64) * 2, -1)
    logprobs, ids = teacher.topk(K, dim=-1)
    if unknown:
        logprobs[::2, 2:] = -math.inf
        ids[::2, 2:] = 0
    return logits, ids, logprobs


def sparse(name: str, logits: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor, **how: object) -> torch.Tensor:
    pair = outcomes(logits.gather(1, ids), torch.logsumexp(logits, 1), logprobs, **how)  # type: ignore[arg-type]
    return divergence(name)(*pair)


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_values_and_gradients_equal_the_dense_oracle(name: str, tail: str, temperature: float, unknown: bool) -> None:
    logits, ids, logprobs = case(0, unknown=unknown)
    logits.requires_grad_()
    got = sparse(name, logits, ids, logprobs, tail=tail, temperature=temperature)
    (got_grad,) = torch.autograd.grad(got.sum(), logits)
    want = torch.stack(
        [
            reference.dense_divergence(
                logits[n], ids[n].tolist(), logprobs[n].tolist(), name, tail=tail, temperature=temperature
            )
            for n in range(N)
        ]
    )
    (want_grad,) = torch.autograd.grad(want.sum(), logits)
    assert torch.allclose(got, want, atol=1e-12)
    assert torch.allclose(got_grad, want_grad, atol=1e-11)


def test_the_answer_by_hand() -> None:
    """Student uniform over 4 ids; target 3/4 and 1/4 on two of them (K = 2, no tail)."""
    logits = torch.zeros(1, 4, dtype=torch.float64)
    ids, logprobs = torch.tensor([[2, 0]]), torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    how = {"tail": "renormalise", "temperature": 1.0}
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert sparse("ce", logits, ids, logprobs, **how).item() == pytest.approx(math.log(4))
    assert sparse("kl", logits, ids, logprobs, **how).item() == pytest.approx(math.log(4) - entropy)
    inside = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)  # the student given that it says one of the two
    assert sparse("reverse_kl", logits, ids, logprobs, **how).item() == pytest.approx(inside)


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd"])
def test_zero_where_student_and_target_agree(name: str, tail: str) -> None:
    logits, _, _ = case(3)
    k = V if tail == "renormalise" else K  # without the bucket they agree only when the target knows every id
    logprobs, ids = torch.log_softmax(logits, -1).topk(k, dim=-1)
    assert sparse(name, logits, ids, logprobs, tail=tail, temperature=1.0).abs().max() < 1e-12


@pytest.mark.parametrize("name", list(DIVERGENCES))
@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_a_one_hot_target_and_a_sure_student_give_finite_gradients(name: str, tail: str) -> None:
    logits = torch.tensor([[40.0, 0.0, 0.0], [0.0, 40.0, 0.0]], requires_grad=True)
    ids = torch.tensor([[0, 0], [0, 0]])
    logprobs = torch.tensor([[0.0, -math.inf], [0.0, -math.inf]])
    value = sparse(name, logits, ids, logprobs, tail=tail, temperature=1.0)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all()
    assert grad.isfinite().all()
    assert value[0].abs() < 1e-6
    if name in ("ce", "kl"):
        assert value[1].item() == pytest.approx(40.0)


def test_float16_rounding_past_one_leaves_no_tail() -> None:
    logprobs = torch.tensor([[0.5, 0.5005]]).log()
    target, _ = outcomes(torch.zeros(1, 2), torch.full((1,), math.log(5)), logprobs, tail="bucket", temperature=1.0)
    assert target.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    assert target[0, -1] == -math.inf


def test_unknown_names_are_refused() -> None:
    logits, ids, logprobs = case(0)
    with pytest.raises(ValueError, match=r"unknown divergence 'l2'.*reverse_kl"):
        divergence("l2")
    with pytest.raises(ValueError, match="unknown tail 'drop'"):
        sparse("ce", logits, ids, logprobs, tail="drop", temperature=1.0)
