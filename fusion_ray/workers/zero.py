"""DeepSpeed for one training run: its config from plain values, the engine, and what must be switched off around it. Called by workers/trainer.py."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

from fusion_ray.config import DistillConfig
from fusion_ray.workers.student import Student

MAX_BUCKET = 50_000_000  # elements; DeepSpeed's own 5e8 would take 2 GB a rank whatever the model's size


def settle(device: torch.device, threads: int) -> None:
    """Make results independent of the machine's load: a fixed number of threads and, on the CPU, deterministic kernels.

    On the CPU it also tells DeepSpeed that none of its compiled operators exist, as it would otherwise compile `deepspeed_shm_comm` in every process
    under one file lock, which a killed build leaves locked; it serves inference only. Torch's warnings that DeepSpeed calls collectives by their old names,
    one for every call, are switched off: a user can do nothing about them.
    """
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    torch.set_num_threads(threads)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
        vars(deepspeed.ops)["__compatible_ops__"] = {}


def zero_config(config: DistillConfig, *, parameters: int, trained: int) -> dict[str, object]:
    """The DeepSpeed config; the user's `distill.deepspeed` keys lie over it. `trained` of the `parameters` have gradients to reduce."""
    bucket, reduced = (max(1024, min(MAX_BUCKET, count)) for count in (parameters, trained))
    zero: dict[str, object] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": reduced,
        "allgather_bucket_size": bucket,
        "overlap_comm": False,
        "contiguous_gradients": True,
    }
    if config.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_param_persistence_threshold": min(100_000, bucket)}
    ours: dict[str, object] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": 1,
        # backward() only accumulates and step() is the boundary: the number of micro-batches may differ from step to step.
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bfloat16"},
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }
    if config.precision == "bfloat16" and config.zero_stage > 1:
        # What the micro-batches of a step add up to would else be rounded to bfloat16 after each of them.
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    return _laid_over(ours, config.deepspeed)


def start_engine(student: Student, config: DistillConfig) -> DeepSpeedEngine:
    """The engine around the student, with torch's AdamW (weight decay on matrices only) over float32 master weights."""
    named = [parameter for parameter in student.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in named if _ndim(parameter) >= 2]
    plain = [parameter for parameter in named if _ndim(parameter) < 2]
    groups: list[dict[str, object]] = [{"params": named, "weight_decay": 0.0}]
    if config.weight_decay > 0:
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]  # adapters are matrices, all of them
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, foreach=False)
    engine, *_ = deepspeed.initialize(
        model=student,
        optimizer=optimizer,
        config=zero_config(
            config, parameters=count_parameters(student), trained=count_parameters(student, trained=True)
        ),
        dist_init_required=not dist.is_initialized(),
    )
    return engine


def count_parameters(student: Student, *, trained: bool = False) -> int:
    """Elements of the whole model, or of what is trained of it; ZeRO-3's partitioned parameters included."""
    counted = [parameter for parameter in student.parameters() if parameter.requires_grad or not trained]
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in counted)


@contextlib.contextmanager
def partitioned_load(config: DistillConfig) -> Iterator[None]:
    """At stage 3 the weights are partitioned over the ranks while they are loaded; the switch is a global of transformers, so it is put back."""
    if config.zero_stage != 3:
        yield
        return
    alive = HfDeepSpeedConfig(zero_config(config, parameters=MAX_BUCKET, trained=MAX_BUCKET))  # noqa: F841  # a weak reference is what transformers keeps
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


def _ndim(parameter: torch.nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _laid_over(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _laid_over(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged
