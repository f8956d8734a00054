"""The published shape of a distillation step in plain torch: dense targets (B, T, V), the logits of every position, softmax cross-entropy over both.

What is published (paper.md 1.1, 1.7 Q16-Q18): the collator spreads the top-k over the vocabulary, scaled to sum to 1, and puts a one-hot row where there
is no target; the trainer takes the cross-entropy of the labels and of those rows. Left out, in favour of this side: a second such tensor for the model
that MinCE did not choose, and the copies that choosing between the two takes. Numbers here are float32, so that the loss is that of the sparse step: this
is its oracle too. Called by `steps.py` and the benchmark's test.

Letters: B rows, T tokens, N predicting positions, K top-k, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # torch's label of a position that is not trained on


@dataclass(frozen=True)
class Dense:
    labels: Tensor  # (B, T) int64, IGNORED where nothing is predicted
    targets: Tensor  # (B, T, V) float32 probabilities, 0 where nothing is predicted


def dense_batch(
    ids: Tensor, position: Tensor, head_ids: Tensor, topk_logprobs: Tensor, has_target: Tensor, *, vocabulary: int
) -> Dense:
    """The tensors of workers/rows.py Batch, spread out."""
    labels = torch.full((ids.numel(),), IGNORED, dtype=torch.int64, device=ids.device)
    labels[position] = head_ids[:, 0]
    targets = torch.zeros(ids.numel(), vocabulary, device=ids.device)
    chosen = position[has_target, None]  # (D, 1)
    probabilities = torch.softmax(
        topk_logprobs[has_target], dim=1
    )  # (D, K); ids of probability 0 are 0 and may repeat a known one
    targets.index_put_((chosen, head_ids[has_target, 1:]), probabilities, accumulate=True)
    targets[position[~has_target], head_ids[~has_target, 0]] = 1.0
    return Dense(labels.view_as(ids), targets.view(*ids.shape, vocabulary))


def dense_loss(logits: Tensor, batch: Dense, *, lm_weight: float) -> Tensor:
    """The mean objective over the predicting positions of logits (B, T, V), a scalar."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)  # (B, T, V)
    predicts = batch.labels != IGNORED
    nll = -logprobs.gather(2, batch.labels.clamp(min=0)[..., None])[..., 0]  # (B, T)
    fusion = -(batch.targets * logprobs).sum(-1)  # (B, T)
    losses = lm_weight * nll + (1.0 - lm_weight) * fusion
    return losses[predicts].sum() / predicts.sum()
