"""The vocabulary head in chunks: what the objective needs of the logits, without the logits ever existing for all positions.

The fusion objective reads a row of logits in two ways only: single entries (the label, the K target ids) and its logsumexp. Both are computed for `chunk`
positions at a time; the backward pass makes a chunk's logits again and turns the gradients of those few numbers into gradients of the hidden states and of
the weight, so peak memory is chunk x V instead of B x T x V. Exact, for any V (rows that only pad the vocabulary take part in the softmax, as they do in
the model). Called by workers/student.py.

Letters: N positions, H hidden size, V vocabulary, J picked ids a position.
"""

import torch
from torch import Tensor


def picked_logits(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int = 1024,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits at `ids` (N, J) and the logsumexp of every row of logits (N,), in float32 or wider.

    hidden (N, H), weight (V, H), bias (V,), ids (N, J) int64 in [0, V). `softcap` c: logits are c tanh(z / c) (Gemma 2).
    """
    picked, sums = _PickedLogits.apply(hidden, weight, bias, ids, chunk, softcap)
    return picked, sums


class _PickedLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        chunk: int,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        picked = torch.empty(ids.shape, dtype=wide, device=hidden.device)  # (N, J)
        sums = torch.empty(len(hidden), dtype=wide, device=hidden.device)  # (N,)
        for rows in _chunks(len(hidden), chunk):
            logits = _logits(hidden[rows], weight, bias, softcap)
            picked[rows] = logits.gather(1, ids[rows])
            sums[rows] = _logsumexp_(logits)
            del logits  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, bias, ids, sums)  # type: ignore[arg-type]  # torch takes None here
        ctx.chunk, ctx.softcap = chunk, softcap  # type: ignore[attr-defined]  # torch's own way to keep plain values
        return picked, sums

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_picked, grad_sums = gradients
        hidden, weight, bias, ids, sums = ctx.saved_tensors  # type: ignore[attr-defined]
        chunk, softcap = ctx.chunk, ctx.softcap  # type: ignore[attr-defined]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=sums.dtype, device=weight.device) if wants_weight else None
        grad_bias = torch.zeros(len(weight), dtype=sums.dtype, device=weight.device) if wants_bias else None
        for rows in _chunks(len(hidden), chunk):
            logits = _logits(hidden[rows], weight, bias, softcap)
            slope = None if softcap is None else 1.0 - (logits / softcap).square_()
            grad = logits.sub_(sums[rows, None]).exp_().mul_(grad_sums[rows, None])  # (chunk, V)
            grad.scatter_add_(1, ids[rows], grad_picked[rows])
            if slope is not None:
                grad.mul_(slope)
            narrow = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(narrow, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                if narrow.dtype == grad_weight.dtype:
                    grad_weight.addmm_(narrow.t(), hidden[rows])
                else:
                    grad_weight.add_(narrow.t() @ hidden[rows])
            if grad_bias is not None:
                grad_bias.add_(grad.sum(0))
            del logits, slope, grad, narrow
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)  # (chunk, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _logsumexp_(logits: Tensor) -> Tensor:
    """torch.logsumexp over the rows of (chunk, V), to the same bits; it writes over the logits, as a second tensor of their size would double the peak."""
    highest = logits.amax(1)
    highest.masked_fill_(highest.isinf(), 0.0)
    return logits.sub_(highest[:, None]).exp_().sum(1).log_().add_(highest)


def _chunks(count: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]
