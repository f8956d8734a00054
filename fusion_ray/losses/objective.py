"""The fusion objective: lm_weight * NLL + (1 - lm_weight) * divergence, as sums over predicting positions (paper.md 1.1; design.md section 6, distill).

Which positions are distilled: those with a target that MinCE gave to the source, and with `on_pivot_win="distill"` (the papers) also those it gave to the
pivot. Every other position - no target, or won by the pivot under `on_pivot_win="sft"` - gets the plain NLL with weight 1. Nothing here averages: the
caller divides by the global count of positions, so any split into micro-batches and workers gives the same gradient. Called by workers/trainer.py.

Letters: N positions, K top-k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_ray.losses.divergences import divergence, outcomes


@dataclass(frozen=True)
class Sparse:
    """Targets of N positions: `topk_logprobs` (N, K; -inf where unknown), `has_target` (N,) and `from_source` (N,) bool. Ids go to the head."""

    topk_logprobs: Tensor
    has_target: Tensor
    from_source: Tensor


def nll_sums(picked: Tensor, logsumexp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Plain fine-tuning: picked (N, 1 or more) with the label's logit first, logsumexp (N,). Returns as `fusion_sums`."""
    nll = logsumexp - picked[:, 0]  # (N,)
    zero = nll.new_zeros(())
    total = nll.sum()
    return total, _metrics(total.detach(), zero, len(nll), zero, zero)


def fusion_sums(
    picked: Tensor,
    logsumexp: Tensor,
    targets: Sparse,
    *,
    lm_weight: float,
    on_pivot_win: str = "distill",
    divergence_name: str = "ce",
    tail: str = "renormalise",
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed objective in nats and, detached, the sums it is made of.

    picked (N, 1 + K): logits of the label and of the target's K ids; logsumexp (N,). Metrics: `nll` over all positions,
    `fusion` (the divergence, unweighted) over the distilled ones, `positions`, `distilled`, `from_source` (distilled towards the source).
    Raises ValueError for an unknown divergence, tail or on_pivot_win.
    """
    if on_pivot_win not in ("distill", "sft"):
        raise ValueError(f"unknown on_pivot_win {on_pivot_win!r}: choose distill or sft")
    distilled = targets.has_target & (
        targets.from_source if on_pivot_win == "sft" else torch.ones_like(targets.has_target)
    )
    nll = logsumexp - picked[:, 0]  # (N,)
    chosen = distilled.nonzero(as_tuple=True)[0]  # (D,)
    target, student = outcomes(
        picked[chosen, 1:],
        logsumexp[chosen],
        targets.topk_logprobs[chosen].to(picked.dtype),
        tail=tail,
        temperature=temperature,
    )
    fusion = divergence(divergence_name)(target, student).sum()
    weight = torch.ones_like(nll).masked_fill(distilled, lm_weight)
    total = (nll * weight).sum() + (1.0 - lm_weight) * fusion
    from_source = (targets.from_source & distilled).sum()
    return total, _metrics(nll.detach().sum(), fusion.detach(), len(nll), distilled.sum(), from_source)


def _metrics(nll: Tensor, fusion: Tensor, count: int, distilled: Tensor, from_source: Tensor) -> dict[str, Tensor]:
    return {
        "nll": nll,
        "fusion": fusion,
        "positions": torch.full_like(nll, count),
        "distilled": distilled.to(nll.dtype),
        "from_source": from_source.to(nll.dtype),
    }
