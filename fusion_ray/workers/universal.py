"""A checkpoint of another number of ranks, through DeepSpeed's universal format: one file a parameter and state, whole and in float32. Called by
workers/training_state.py.

What DeepSpeed 0.19.8 does amiss is put right here, after its load: at ZeRO stage 3 all groups of parameters get the hyperparameters of the first one
(biases would decay) and share one count of steps (counted once a group), and the common file holds a whole shard.
"""

import argparse
import contextlib
import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import MethodType

import torch
from deepspeed.checkpoint import constants, ds_to_universal
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

# What ds_to_universal asks of a checkpoint at stages 1 and 2. Its lists of parameters that tensor parallelism cut in special ways are empty: here every
# rank has whole parameters, and the vocabulary is not padded.
INFO = {
    constants.UNIVERSAL_CHECKPOINT_INFO: {
        constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE
    }
}
KNOWN = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
STATES = ("fp32", "exp_avg", "exp_avg_sq")


def convert(source: Path, target: Path, parameters: Iterable[str]) -> None:
    """Write the checkpoint folder `source` into the new folder `target`, shard by shard in this process.

    Raises RuntimeError when a state of one of the trained `parameters` is missing afterwards.
    """
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="universal_") as folder, plain_values_only():
        # Under names of our own, as DeepSpeed puts its paths into patterns, where the letters of a user's folder may mean something.
        names = {"input_folder": source, "output_folder": target}
        paths = {option: os.path.join(folder, option) for option in names}
        for option, path in names.items():
            os.symlink(path.absolute(), paths[option])
        workers = {"num_extract_workers": 1, "num_merge_workers": 1}
        switches = {"keep_temp_folder": False, "strict": True, "inject_missing_state": False}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(argparse.Namespace(**paths, **workers, **switches))
        _without_shard(target / "zero" / "optimizer_state.pt")
    needed = [f"{name}/{state}.pt" for name in parameters for state in STATES]
    if missing := [name for name in needed if not (target / "zero" / name).is_file()]:
        raise RuntimeError(f"DeepSpeed's conversion of {source} left out {missing[0]} and {len(missing) - 1} more")


def load_universal(engine: DeepSpeedEngine, folder: Path, tag: str) -> dict[str, object]:
    """Collective: put what `convert` wrote into `folder`/`tag` into the (fresh) engine; returns the checkpoint's client state."""
    fresh = [{name: value for name, value in group.items() if name != "params"} for group in _groups(engine)]
    engine.load_universal_checkpoint = MethodType(lambda _: True, engine)  # otherwise a key of its config, fixed before
    try:
        with plain_values_only():
            _, client_state = engine.load_checkpoint(str(folder), tag=tag)
    finally:
        del engine.load_universal_checkpoint  # the class has its own
    for group, values in zip(_groups(engine), fresh, strict=True):
        group |= values
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = torch.as_tensor(state["step"]).clone()
    return dict(client_state)


@contextlib.contextmanager
def plain_values_only() -> Iterator[None]:
    """No torch.load in here runs arbitrary pickle, whatever it asks for: tensors, plain values and the few classes of DeepSpeed that its states hold."""
    torch.serialization.add_safe_globals(KNOWN)  # for good: its context manager, nested, takes the outer one's away
    switch = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        os.environ.pop(switch)
        if before is not None:
            os.environ[switch] = before


def _groups(engine: DeepSpeedEngine) -> list[dict[str, object]]:
    found: list[dict[str, object]] = engine.optimizer.optimizer.param_groups
    return found


def _without_shard(common: Path) -> None:
    """Stage 3 leaves rank 0's whole shard in the file that every rank reads for the count of steps alone."""
    content = torch.load(common, map_location="cpu", weights_only=True)
    if content.pop(constants.FP32_FLAT_GROUPS, None) is None:
        return
    optimizer = content[constants.OPTIMIZER_STATE_DICT]
    optimizer["state"] = {number: {"step": state["step"]} for number, state in optimizer["state"].items()}
    torch.save(content, common)
