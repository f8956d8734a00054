"""The chunked head against plain logits: values, gradients, any chunk size, padded vocabularies, softcap, half precision."""

import pytest
import torch

from fusion_ray.losses.head import picked_logits

N, H, V, J = 11, 6, 23, 3


def tensors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, V, (N, J), generator=generator)


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.gather(1, ids), torch.logsumexp(logits, 1)


def value(picked: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    return (picked * torch.arange(1, J + 1)).sin().sum() + (sums * torch.arange(N)).sum() * 0.1


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, N, 100])
def test_equal_to_plain_logits_with_gradients(chunk: int, with_bias: bool, softcap: float | None) -> None:
    hidden, weight, bias, ids = tensors()
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    given = bias if with_bias else None
    got = picked_logits(hidden, weight, ids, bias=given, chunk=chunk, softcap=softcap)
    want = plain(hidden, weight, given, ids, softcap)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    for a, b in zip(torch.autograd.grad(value(*got), leaves), torch.autograd.grad(value(*want), leaves), strict=True):
        assert torch.allclose(a, b, atol=1e-11)


def test_gradcheck() -> None:
    hidden, weight, bias, ids = tensors()
    assert torch.autograd.gradcheck(
        lambda h, w, b: picked_logits(h, w, ids, bias=b, chunk=4, softcap=3.0), (hidden, weight, bias)
    )


def test_repeated_ids_in_a_row_add_up() -> None:
    hidden, weight, _, _ = tensors()
    ids = torch.full((N, J), 5)
    picked, _ = picked_logits(hidden, weight, ids, chunk=3)
    (grad,) = torch.autograd.grad(picked.sum(), weight)
    assert torch.allclose(grad[5], J * hidden.sum(0))
    assert grad[:5].abs().max() == 0


def test_padded_vocabulary_rows_take_part_in_the_softmax_as_in_the_model() -> None:
    hidden, weight, _, ids = tensors()
    padded = torch.cat([weight.detach(), torch.zeros(9, H, dtype=weight.dtype)])
    _, sums = picked_logits(hidden, padded, ids, chunk=4)
    assert torch.allclose(sums, torch.logsumexp(hidden @ padded.T, 1))


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, _, ids = tensors()
    picked, sums = picked_logits(hidden, weight.detach(), ids, chunk=4)
    value(picked, sums).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_half_precision_comes_out_in_float32() -> None:
    hidden, weight, _, ids = tensors(torch.bfloat16)
    picked, sums = picked_logits(hidden, weight, ids, chunk=4)
    assert picked.dtype == sums.dtype == torch.float32
    value(picked, sums).backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    wide = plain(hidden.float(), weight.float(), None, ids, None)
    assert torch.allclose(sums, wide[1], atol=0.05)


@pytest.mark.parametrize("lift", [0.0, -torch.inf, torch.inf])
def test_logsumexp_is_torchs_to_the_bit(lift: float) -> None:
    """Computed over the logits themselves; impossible and infinite logits are what they are in torch."""
    hidden, weight, bias, ids = tensors(torch.float32)
    bias = bias.detach()
    for lifted in (bias.index_fill(0, torch.tensor([2, 7]), 0.0), torch.full_like(bias, 0.0)):
        given = torch.where(lifted == 0, lift, lifted)
        picked, sums = picked_logits(hidden, weight, ids, bias=given, chunk=N)
        want = plain(hidden, weight, given, ids, None)
        assert torch.equal(sums, want[1])
        assert torch.equal(picked, want[0])
