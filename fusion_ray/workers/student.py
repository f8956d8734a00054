"""The pivot made ready for distillation: a causal language model whose head answers for single ids only. Called by workers/trainer.py.

The model's own output layer is replaced by one of the same parameters and names that also runs in chunks (losses/head.py), so that ZeRO-3's gathering
hooks, tied weights and exported keys stay what they are.
"""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fusion_ray.losses.head import picked_logits
from fusion_ray.losses.objective import Sparse, fusion_sums, nll_sums

METRICS = ("nll", "fusion", "positions", "distilled", "from_source")


class ChunkedHead(nn.Module):
    """The output layer; with `ids` it gives picked logits (N, J) and logsumexp (N,), without them plain logits."""

    def __init__(self, linear: nn.Linear, chunk: int, softcap: float | None) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.chunk = chunk
        self.softcap = softcap

    def forward(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if ids is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        return picked_logits(hidden, self.weight, ids, bias=self.bias, chunk=self.chunk, softcap=self.softcap)


class Student(nn.Module):
    """Summed objective of a batch. `objective` holds the keyword scalars of `fusion_sums`; None trains by plain NLL."""

    def __init__(self, model: PreTrainedModel, head: ChunkedHead, objective: dict[str, str | float] | None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self._head = (head,)  # in a tuple, so that its parameters are not registered twice

    def forward(
        self,
        ids: Tensor,
        position: Tensor,
        head_ids: Tensor,
        topk_logprobs: Tensor | None,
        has_target: Tensor | None,
        from_source: Tensor | None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss, summed, and the metrics named by METRICS (5,), detached. Shapes as in workers/rows.py Batch."""
        picked, logsumexp = self.picked(ids, position, head_ids, position_ids)
        if self.objective is None or topk_logprobs is None or has_target is None or from_source is None:
            total, metrics = nll_sums(picked, logsumexp)
        else:
            targets = Sparse(topk_logprobs, has_target, from_source)
            total, metrics = fusion_sums(picked, logsumexp, targets, **self.objective)  # type: ignore[arg-type]  # plain scalars, checked by name
        return total, torch.stack([metrics[name] for name in METRICS])

    def picked(
        self, ids: Tensor, position: Tensor, head_ids: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        packed = {} if position_ids is None else {"position_ids": position_ids}
        hidden = self.model.base_model(input_ids=ids, use_cache=False, **packed).last_hidden_state  # (B, T, H)
        found: tuple[Tensor, Tensor] = self._head[0](hidden.flatten(0, 1)[position], head_ids)
        return found

    @torch.no_grad()
    def check_head(self, device: torch.device) -> None:
        """Compare with the model's own logits on a short row. Raises ValueError for an architecture that does more to them than this head."""
        ids = torch.arange(8, device=device)[None] % self.model.get_input_embeddings().num_embeddings
        position = torch.arange(8, device=device)
        picked, logsumexp = self.picked(ids, position, ids.T)
        logits = self.model(input_ids=ids, use_cache=False).logits[0].float()
        own = torch.log_softmax(logits, -1).gather(1, ids.T)[:, 0]
        difference = float((picked[:, 0] - logsumexp - own).abs().max())
        if not difference < 0.05:
            raise ValueError(
                f"the logits of {type(self.model).__name__} are not its last hidden state times its output layer (logprobs differ by {difference:.3g}): "
                "this architecture cannot be the pivot yet"
            )


def load_student(
    folder: str,
    *,
    trust_remote_code: bool,
    head_chunk: int,
    gradient_checkpointing: bool,
    objective: dict[str, str | float] | None,
) -> Student:
    """The model in `folder` with float32 weights. Raises ValueError when its output layer is not a plain linear one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.config.use_cache = False
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"the output layer of {folder} is {type(linear).__name__}, not a linear layer: it cannot be the pivot"
        )
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    head = ChunkedHead(linear, head_chunk, softcap)
    name = next(name for name, module in model.named_modules() if module is linear)
    model.set_submodule(name, head)
    return Student(model, head, objective)


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Rows of the embedding: ids below it can be read and predicted."""
    return int(model.config.get_text_config().vocab_size)
