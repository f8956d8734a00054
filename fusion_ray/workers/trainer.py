"""One rank's distillation (paper.md 1.1; design.md section 6, distill), written as if there were no Ray: it needs an initialised torch process group.

float32 master weights, DeepSpeed ZeRO 1-3, torch's AdamW, a learning rate and a batch that are functions of the step. A rank's loss is a sum; it is
divided by the global batch's count of predicting positions, which every rank knows from the rows' index, so any split of the batch into ranks and
micro-batches gives the gradient of the same mean. Called by stages/distill.py and, in a plain process, by tests.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from fusion_ray.config import DistillConfig
from fusion_ray.records import Report
from fusion_ray.store import Folder
from fusion_ray.workers.ahead import ahead
from fusion_ray.workers.export import export, gather_weights
from fusion_ray.workers.figures import Clock, averages
from fusion_ray.workers.heldout import Heldout, hold_out
from fusion_ray.workers.lora import add_adapters, gather_adapters, merged_model
from fusion_ray.workers.loss_watch import LossWatch
from fusion_ray.workers.packing_check import check_packing
from fusion_ray.workers.rows import Batch, Rows
from fusion_ray.workers.schedule import Schedule, StepPlan, learning_rate
from fusion_ray.workers.student import METRICS, Student, load_student, vocabulary_rows
from fusion_ray.workers.training_state import Checkpoints, Progress
from fusion_ray.workers.zero import count_parameters, partitioned_load, settle, start_engine

logger = logging.getLogger(__name__)

NOTICE_SECONDS = (
    2.0  # between two questions whether a machine is about to be taken; clouds say it half a minute before, or two
)


Tensors = list[torch.Tensor | None]


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes. `cache` and `scratch` are local to this machine; `checkpoints` is storage that every rank reaches."""

    pivot: str
    shards: Sequence[str]
    cache: str
    scratch: str
    checkpoints: Folder
    export: str


def train(
    places: Places,
    config: DistillConfig,
    *,
    key: str,
    seed: int,
    pivot: str = "",
    max_empty: float = 1.0,
    trust_remote_code: bool = False,
    threads: int = 1,
    report: Report,
    notice: Callable[[], bool] = lambda: False,
) -> dict[str, object]:
    """Train to the end from the newest checkpoint, export on rank 0, and return the run's facts (no times: equal runs give equal facts).

    Collective over the process group; a run that another number of ranks began goes on with the same global batches. `pivot` is the fingerprint that the
    rows must have been aligned for, `max_empty` the share of them that may have nothing to learn from. `report` is called on rank 0 after every step.
    `notice` is asked now and then, after a step and on every rank together: when it first says that the machine of one of them is about to be taken, the
    step is saved at once. Raises ValueError for rows or checkpoints that do not fit, for a loss that diverges or is not finite, and for an export that is
    not the model.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    settle(device, threads)
    fuse = config.fusion != "none"
    with partitioned_load(config):
        student = load_student(
            places.pivot,
            trust_remote_code=trust_remote_code,
            head_chunk=config.head_chunk,
            gradient_checkpointing=config.gradient_checkpointing,
            objective=_objective(config) if fuse else None,
        )
    if config.lora is not None:
        add_adapters(student.model, config.lora, seed=seed)
    rows = Rows(
        places.shards,
        cache=places.cache,
        vocabulary=vocabulary_rows(student.model),
        max_length=config.max_length,
        targets=fuse,
        with_bytes=config.heldout_share > 0,
        pivot=pivot,
    )
    rows.check_empty(max_empty)
    heldout = None
    if config.heldout_share:
        rows, held = hold_out(rows, share=config.heldout_share, seed=seed)
        lines = config.max_length if config.packing else None
        heldout = Heldout(held, micro_batch_size=config.micro_batch_size, line_length=lines)
    schedule = _schedule(rows, config, world_size=world_size, seed=seed, packing=config.packing)
    # As one worker alone would read the rows, so that a run's facts do not depend on how many there are.
    padding = {
        packing: _schedule(rows, config, world_size=1, seed=seed, packing=packing).padding_share()
        for packing in (False, True)
    }
    engine = start_engine(student, config)
    student.check_head(device)
    if config.packing:
        check_packing(student, device, max_length=config.max_length)
    checkpoints = Checkpoints(places.checkpoints, scratch=Path(places.scratch), key=key, seed=seed)
    progress = checkpoints.load(engine) or Progress(0, {})
    totals = progress.totals
    logger.info(
        "training from step %d to %d on %d rows, %.1f%% of a micro-batch is padding",
        *(progress.step, schedule.steps, len(rows), 100 * padding[config.packing]),
    )
    student.train()
    if heldout and not progress.step:
        heldout.measure(engine, device, step=0, totals=totals)
    clock, warned, watch = Clock(schedule.steps), False, LossWatch(vocabulary_rows(student.model))
    steps = range(progress.step, schedule.steps)
    batches = ahead(lambda lines: _pinned(rows.collate(lines), device), _micro_batches(rows, schedule, steps, rank))
    for number in steps:
        plan = schedule.step(number)
        rate = learning_rate(
            number,
            schedule.steps,
            peak=config.learning_rate,
            warmup_ratio=config.warmup_ratio,
            schedule=config.schedule,
        )
        torch.manual_seed((seed * 1_000_003 + number) * 4096 + rank)  # dropout, where a model has it
        ask = not warned and rank == 0 and clock.asks(every=NOTICE_SECONDS)
        sums, ask = _step(engine, rows, plan, batches, rate=rate, rank=rank, device=device, ask=ask)
        norm = float(engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise ValueError(
                f"the gradient of step {number + 1} is not finite; rows of the batch: {_names(rows, plan.rows)}. Lower distill.learning_rate or max_grad_norm"
            )
        diverged = watch.add(averages(sums)["sft"], totals)
        if diverged:
            raise ValueError(
                f"the loss of step {number + 1} has diverged: {diverged}; rows of the batch: {_names(rows, plan.rows)}. "
                "Lower distill.learning_rate, or remove them from the corpus"
            )
        total = totals.setdefault(str(plan.epoch), dict.fromkeys(METRICS, 0.0))
        for name, value in sums.items():
            total[name] += value
        bits: dict[str, float] = {}
        ticked = clock.tick(number + 1, int(rows.lengths[plan.rows].sum()))
        if heldout and heldout.due(number + 1, schedule.steps, every=config.heldout_every):
            bits = heldout.measure(engine, device, step=number + 1, totals=totals)
            clock.restart()
        if rank == 0:
            figures = {"epoch": plan.epoch, **averages(sums), **bits, "learning_rate": rate, "grad_norm": norm}
            report({"done": number + 1, "total": schedule.steps, "unit": "steps"} | figures | ticked)
        is_due = (number + 1) % config.checkpoint_every == 0
        if ask and notice():
            warned = is_due = True
            logger.warning("a machine of this training is about to be taken: saving step %d", number + 1)
        if is_due and number + 1 < schedule.steps:
            checkpoints.save(engine, Progress(number + 1, totals))
    dtype = _export(student, places, config, trust_remote_code=trust_remote_code)
    parameters, trained = count_parameters(student), count_parameters(student, trained=True)
    return {
        "steps": schedule.steps,
        "rows": len(rows),
        "rows_cut": rows.cut,
        "rows_empty": rows.empty,
        "tokens_an_epoch": int(rows.lengths.sum()),
        "positions_an_epoch": int(rows.positions.sum()),
        "packing": config.packing,
        "padding_share": padding[config.packing],
        "padding_share_otherwise": padding[not config.packing],  # with the other value of distill.packing
        "parameters": parameters - (0 if config.lora is None else trained),  # as exported
        "parameters_trained": trained,
        "dtype": dtype,
        "epochs": [averages(totals[str(epoch)]) for epoch in range(config.epochs)],
        "heldout": heldout.facts(totals) if heldout else None,
    }


def _export(student: Student, places: Places, config: DistillConfig, *, trust_remote_code: bool) -> str:
    """Collective: the model, with the adapters merged into it where there are any, as a plain folder; returns the name of its dtype."""
    pivot, keep = places.pivot, dist.get_rank() == 0
    adapters = {} if config.lora is None else gather_adapters(student.model, keep=keep)
    weights = {} if config.lora is not None else gather_weights(student.model, keep=keep)

    def write() -> str:
        model, found = student.model, weights
        if config.lora is not None:
            model = merged_model(pivot, adapters, trust_remote_code=trust_remote_code)
            found = gather_weights(model, keep=True)
        return export(
            model,
            found,
            Path(places.export),
            pivot=Path(pivot),
            dtype=config.export_dtype,
            trust_remote_code=trust_remote_code,
        )

    return _on_rank_0(write)


def _micro_batches(rows: Rows, schedule: Schedule, steps: range, rank: int) -> Iterator[list[list[int]]]:
    """The lines of this rank's micro-batches of all steps; the shortest row of the step stands where it has none of its own."""
    for number in steps:
        plan = schedule.step(number)
        shortest = min(plan.rows, key=lambda row: (rows.lengths[row], row))
        for lines in plan.micro_batches[rank]:
            yield lines or [[shortest]]


def _step(
    engine: DeepSpeedEngine,
    rows: Rows,
    plan: StepPlan,
    batches: Iterator[Tensors],
    *,
    rate: float,
    rank: int,
    device: torch.device,
    ask: bool,
) -> tuple[dict[str, float], bool]:
    """Forward, backward and update of one global batch, of which `batches` gives this rank's micro-batches; returns the batch's global METRICS sums, and on
    every rank whether one of them set `ask`.

    Every rank runs equally many micro-batches, as ZeRO's collectives need; one without rows of its own runs the shortest of the batch at weight 0.
    Raises ValueError, on every rank and before the update, naming the rows whose loss is not finite.
    """
    count = int(rows.positions[plan.rows].sum())
    sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
    broken = torch.zeros(len(plan.rows), dtype=torch.float64, device=device)
    place = {row: number for number, row in enumerate(plan.rows)}
    for lines in plan.micro_batches[rank]:
        loss, metrics = engine(
            *(None if each is None else each.to(device, non_blocking=True) for each in next(batches))
        )
        engine.backward(loss * (dist.get_world_size() / count if lines else 0.0), scale_wrt_gas=False)
        if not lines:
            continue
        # Nothing here waits for the device: the next micro-batch is on its way while this one is computed.
        sums += metrics.double()
        mine = torch.tensor([place[row] for line in lines for row in line])
        broken[mine.to(device)] = 1.0 - torch.isfinite(loss.detach()).double()
    shared = torch.cat([sums, broken, torch.tensor([float(ask)], dtype=torch.float64, device=device)])
    dist.all_reduce(shared)
    sums, broken, asked = shared.cpu().split([len(METRICS), len(plan.rows), 1])
    if bool(broken.any()):
        bad = [plan.rows[index] for index in broken.nonzero()[:, 0].tolist()]
        raise ValueError(
            f"the loss is not finite; rows of the micro-batches concerned: {_names(rows, bad)}. Remove them from the corpus, or lower distill.learning_rate"
        )
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    engine.step()
    return dict(zip(METRICS, sums.tolist(), strict=True)), bool(asked)


def _pinned(batch: Batch, device: torch.device) -> Tensors:
    """The arrays that the student takes, on the host; for a GPU in memory that is copied from without waiting."""
    arrays = (batch.ids, batch.position, batch.head_ids, batch.topk_logprobs, batch.has_target, batch.from_source)
    found = [
        None if array is None else torch.from_numpy(np.ascontiguousarray(array))
        for array in (*arrays, batch.position_ids)
    ]
    return found if device.type == "cpu" else [None if each is None else each.pin_memory() for each in found]


def _schedule(rows: Rows, config: DistillConfig, *, world_size: int, seed: int, packing: bool) -> Schedule:
    return Schedule(
        rows.lengths,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        epochs=config.epochs,
        world_size=world_size,
        seed=seed,
        line_length=config.max_length if packing else None,
    )


def _objective(config: DistillConfig) -> dict[str, str | float]:
    return {
        "lm_weight": config.lm_weight,
        "on_pivot_win": config.on_pivot_win,
        "divergence_name": config.divergence,
        "tail": config.tail,
        "temperature": config.temperature,
    }


def _names(rows: Rows, members: Sequence[int], most: int = 16) -> str:
    named = ", ".join(repr(rows.id(row)) for row in members[:most])
    return named if len(members) <= most else f"{named} and {len(members) - most} more"


def _on_rank_0(work: Callable[[], str]) -> str:
    """Rank 0's result on every rank; its ValueError is raised on every rank too, so that none waits for ever."""
    box: list[tuple[str, str]] = [("", "")]
    if dist.get_rank() == 0:
        try:
            box = [("done", work())]
        except ValueError as error:
            box = [("failed", str(error))]
    dist.broadcast_object_list(box, src=0)
    outcome, value = box[0]
    if outcome == "failed":
        raise ValueError(value)
    return value
