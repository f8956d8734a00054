"""Slow obvious oracle of the fusion objective: dense (V,) distributions, float64, one position at a time, gradients by torch on the dense graph."""

import math

import torch


def dense_objective(
    logits: torch.Tensor,
    labels: list[int],
    topk_ids: list[list[int]],
    topk_logprobs: list[list[float]],
    has_target: list[bool],
    from_source: list[bool],
    *,
    lm_weight: float,
    on_pivot_win: str,
    divergence_name: str,
    tail: str,
    temperature: float,
) -> torch.Tensor:
    """Summed objective of logits (N, V), float64."""
    total = torch.zeros((), dtype=torch.float64)
    for n in range(len(labels)):
        nll = -torch.log_softmax(logits[n], 0)[labels[n]]
        if not has_target[n] or (on_pivot_win == "sft" and not from_source[n]):
            total = total + nll
            continue
        value = dense_divergence(
            logits[n], topk_ids[n], topk_logprobs[n], divergence_name, tail=tail, temperature=temperature
        )
        total = total + lm_weight * nll + (1 - lm_weight) * value
    return total


def dense_divergence(
    logits: torch.Tensor, ids: list[int], logprobs: list[float], name: str, *, tail: str, temperature: float
) -> torch.Tensor:
    known = [(i, lp) for i, lp in zip(ids, logprobs, strict=True) if lp != -math.inf]
    if tail == "renormalise":
        weights = [math.exp(lp / temperature) for _, lp in known]
        p = torch.zeros(len(logits), dtype=torch.float64)
        for (i, _), w in zip(known, weights, strict=True):
            p[i] += w / sum(weights)
        q = torch.softmax(logits, 0)
    else:
        full = torch.softmax(logits, 0)
        q_known = torch.stack([full[i] for i, _ in known])
        q = torch.cat([q_known, (1 - q_known.sum())[None]])
        p_known = [math.exp(lp) for _, lp in known]
        p = torch.tensor([*p_known, 1 - sum(p_known)], dtype=torch.float64) ** (1 / temperature)
        p = p / p.sum()
    support = p > 0
    if name == "ce":
        return -(p[support] * q[support].log()).sum()
    if name == "kl":
        return (p[support] * (p[support].log() - q[support].log())).sum()
    if name == "reverse_kl":
        inside = q[support] / q[support].sum()
        return (inside * (inside.log() - p[support].log())).sum()
    middle = (p + q) / 2
    left = (p[support] * (p[support].log() - middle[support].log())).sum()
    return 0.5 * left + 0.5 * (q * (q.log() - middle.log())).sum()
