"""Which device a merge uses. torch takes seconds to load, so the machine is asked first: torch is loaded only where there may be a CUDA device.

Called by merge_command.py; a run says it by resources.merge.gpus.
"""

import os
from glob import glob
from typing import Literal

from fusion_ray.config import ConfigError

DeviceKind = Literal["cpu", "cuda"]
# NVIDIA's driver, the one of Windows' Linux, and Tegra's. Images set NVIDIA_VISIBLE_DEVICES whether there is a device or not, so it says nothing.
_FILES = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/nvhost-gpu")


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> DeviceKind:
    """`auto` is CUDA where torch finds a device. Raises ConfigError where CUDA is wanted and there is none."""
    if wanted == "cpu" or (wanted == "auto" and not _may_be_one()):
        return "cpu"
    if _torch_finds_one():
        return "cuda"
    if wanted == "cuda":
        raise ConfigError(
            "--device cuda: torch finds no CUDA device on this machine: leave the option out, or install torch with CUDA and check what "
            "CUDA_VISIBLE_DEVICES lets it see"
        )
    return "cpu"


def _may_be_one() -> bool:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(map(glob, _FILES))


def _torch_finds_one() -> bool:
    try:
        import torch
    except ImportError:  # a merge needs none
        return False
    return torch.cuda.is_available()
