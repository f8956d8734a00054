"""Divergences between a sparse target and the student's distribution, one value a position (paper.md 1.1, 1.2, Q17).

The target knows K ids; what becomes of the rest of its mass is `tail`:
- "renormalise" (the papers): the K probabilities are scaled to sum to 1, and the student keeps its full vocabulary;
- "bucket": everything outside the K ids is one more outcome, on both sides, so that mass in the tail is matched too.
Ids with a target logprob of -inf are unknown and take no part. Called by losses/objective.py; everything in float32 or wider.

Letters: N positions, K top-k, J outcomes (K, or K + 1 with the bucket).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

LOG_2 = math.log(2.0)


def outcomes(
    student_logits: Tensor, logsumexp: Tensor, target_logprobs: Tensor, *, tail: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (target, student), each (N, J), of the outcomes that are compared.

    student_logits (N, K) at the target's ids, `logsumexp` (N,) of the student's whole row of logits, target_logprobs (N, K). The temperature flattens
    (above 1) or sharpens the target alone, as in the published collator; with the bucket the K + 1 outcomes are tempered, the tail being known by its
    mass alone. Raises ValueError for an unknown tail.
    """
    student = student_logits - logsumexp[:, None]  # (N, K)
    if tail == "renormalise":
        return torch.log_softmax(target_logprobs / temperature, dim=-1), student
    if tail != "bucket":
        raise ValueError(f"unknown tail {tail!r}: choose renormalise or bucket")
    student = student.masked_fill(_impossible(target_logprobs), -torch.inf)
    target = torch.log_softmax(_with_tail(target_logprobs) / temperature, dim=-1)
    return target, _with_tail(student)  # (N, K + 1)


def cross_entropy(target: Tensor, student: Tensor) -> Tensor:
    """-sum_k p_k log q_k (N,): the papers' choice; its gradient equals kl's, as the target is constant."""
    return -_expect(target, student)


def kl(target: Tensor, student: Tensor) -> Tensor:
    """KL(p || q) (N,)."""
    return _expect(target, target) - _expect(target, student)


def reverse_kl(target: Tensor, student: Tensor) -> Tensor:
    """KL(q || p) (N,) with q conditioned on the outcomes where p > 0, without which it would be infinite."""
    student = torch.log_softmax(student.masked_fill(_impossible(target), -torch.inf), dim=-1)
    return _expect(student, student) - _expect(student, target)


def jsd(target: Tensor, student: Tensor) -> Tensor:
    """Jensen-Shannon divergence (N,) in nats; the student's mass outside the outcomes, where p = 0, counts log(2) / 2 a unit."""
    student = student.masked_fill(_impossible(target), -torch.inf)
    middle = torch.logaddexp(target, student.masked_fill(_impossible(target), 0.0)) - LOG_2
    middle = middle.masked_fill(_impossible(target), -torch.inf)
    inside = _expect(target, target) - _expect(target, middle) + _expect(student, student) - _expect(student, middle)
    outside = (1.0 - student.exp().sum(-1)).clamp(min=0.0)
    return 0.5 * (inside + LOG_2 * outside)


Divergence = Callable[[Tensor, Tensor], Tensor]
DIVERGENCES: dict[str, Divergence] = {"ce": cross_entropy, "kl": kl, "reverse_kl": reverse_kl, "jsd": jsd}


def divergence(name: str) -> Divergence:
    """Raises ValueError, naming the known ones, for an unknown divergence."""
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}: choose one of {', '.join(DIVERGENCES)}")
    return DIVERGENCES[name]


def _impossible(logprobs: Tensor) -> Tensor:
    return logprobs == -torch.inf


def _expect(weights: Tensor, values: Tensor) -> Tensor:
    """sum_k exp(weights_k) values_k (N,); outcomes of probability 0 count 0, in the gradient too."""
    never = _impossible(weights)
    return (weights.masked_fill(never, 0.0).exp() * values.masked_fill(never, 0.0)).masked_fill(never, 0.0).sum(-1)


def _with_tail(logprobs: Tensor) -> Tensor:
    """(N, K) logprobs with log(1 - sum) as the outcome number K + 1.

    Where rounding leaves no mass for the tail (float16 storage; a student that is sure), the tail is impossible (-inf) and the K are renormalised.
    """
    known = torch.logsumexp(logprobs, dim=-1, keepdim=True)  # (N, 1)
    full = known > -torch.finfo(logprobs.dtype).eps
    tail = torch.log(-torch.expm1(known.masked_fill(full, -1.0))).masked_fill(full, -torch.inf)
    return torch.cat([logprobs - known.clamp(min=0.0), tail], dim=-1)
