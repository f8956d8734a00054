"""One training step of one model under three objectives: fusion and plain SFT as the trainer has them, and the published dense shape. Called by `distill.py`.

A step is all that the trainer does for one micro-batch that is its own global batch, less DeepSpeed: collation, forward, backward, gradient clipping, torch's
AdamW, gradients freed. The three share the weights, the optimizer and the rows; SFT reads them without targets, as `distill.fusion: none` does.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from distilling_speed.dense import dense_batch, dense_loss
from fusion_ray.config import DistillConfig
from fusion_ray.workers.rows import Rows
from fusion_ray.workers.student import load_student, vocabulary_rows

FUSION, SFT, DENSE = "fusion", "sft", "dense"
SIDES = (FUSION, SFT, DENSE)
DENSE_COPIES = 5  # of (B, T, V) in float32 at the peak: targets, logits, logprobs and two gradients


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settle() -> None:
    """Deterministic kernels on the CPU, as the trainer has them (workers/zero.py)."""
    if device().type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module


class Steps:
    """The model, its optimizer and the rows, on the GPU if there is one: float32 on the CPU, on a GPU the model in bfloat16 throughout."""

    def __init__(self, pivot: Path, shards: Sequence[Path], *, cache: Path, config: DistillConfig) -> None:
        self.config = config
        self.student = load_student(
            str(pivot),
            trust_remote_code=False,
            head_chunk=config.head_chunk,
            gradient_checkpointing=config.gradient_checkpointing,
            objective={
                "lm_weight": config.lm_weight,
                "on_pivot_win": config.on_pivot_win,
                "divergence_name": config.divergence,
                "tail": config.tail,
                "temperature": config.temperature,
            },
        )
        self.student.to(device(), torch.bfloat16 if config.precision == "bfloat16" else torch.float32).train()
        self.vocabulary = vocabulary_rows(self.student.model)
        self.rows = {
            side: Rows(
                shards, cache=cache, vocabulary=self.vocabulary, max_length=config.max_length, targets=side != SFT
            )
            for side in SIDES
        }
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=0.0, foreach=False
        )
        self.lines = [[row] for row in range(config.micro_batch_size)]

    def step(self, side: str) -> float:
        """One step; returns the mean loss before it. Everything is done when it returns."""
        loss = self.loss(side)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.wait()
        return float(loss.detach())

    def loss(self, side: str) -> Tensor:
        """The mean objective of the micro-batch."""
        tensors = self.tensors(side)
        if side != DENSE:
            total, _ = self.student(*tensors)
            return total / len(tensors[1])
        targets = dense_batch(*tensors[:5], vocabulary=self.vocabulary)
        logits = self.student.model(input_ids=tensors[0], use_cache=False).logits
        return dense_loss(logits, targets, lm_weight=self.config.lm_weight)

    def tensors(self, side: str) -> list[Tensor]:
        """The Batch on the device, in the order of the student's arguments; without targets the last three are None."""
        batch = self.rows[side].collate(self.lines)
        arrays = (batch.ids, batch.position, batch.head_ids, batch.topk_logprobs, batch.has_target, batch.from_source)
        tensors = [
            None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(device()) for array in arrays
        ]
        return cast(list[Tensor], tensors)  # None is for the student to see alone

    def wait(self) -> None:
        if device().type == "cuda":
            torch.cuda.synchronize()


def config(*, batch: int, tokens: int) -> DistillConfig:
    """The defaults, the published objective among them, with this micro-batch."""
    precision = "float32" if device().type == "cpu" else "bfloat16"
    return DistillConfig.model_validate({"micro_batch_size": batch, "max_length": tokens, "precision": precision})


def check_memory(batch: int, tokens: int, vocabulary: int) -> None:
    """Raises MemoryError where the dense side would not fit beside what runs."""
    needed = DENSE_COPIES * 4 * batch * tokens * vocabulary
    if device().type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(1024 * int(row.split()[1]) for row in file if row.startswith("MemAvailable"))
    if free < 1.15 * needed:
        raise MemoryError(
            f"the dense step at a vocabulary of {vocabulary} takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free (process {os.getpid()}): "
            "give a smaller --batch, or --only step"
        )
