"""How two merges of the same models differ: by position, over all tensors of two folders in bfloat16. Called by `merge.py` and its test."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merging_speed.models import Bits, to_float32

PIECE = 1 << 24


@dataclass(frozen=True)
class Differences:
    positions: int
    differ: int
    by_more_than_one: int  # of units in the last place
    largest: float  # absolute difference


def compare(first: Path, second: Path) -> Differences:
    """Raises ValueError where the folders do not hold the same tensors in bfloat16."""
    ours, theirs = tensors_of(first), tensors_of(second)
    shapes = [{name: bits.size for name, bits in each.items()} for each in (ours, theirs)]
    if shapes[0] != shapes[1]:
        names = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise ValueError(f"{first} and {second} do not hold the same tensors: {', '.join(names[:3])} differ")
    differ = apart = 0
    largest = 0.0
    for name, bits in ours.items():
        for start in range(0, bits.size, PIECE):
            a, b = bits[start : start + PIECE], theirs[name][start : start + PIECE]
            places = np.flatnonzero(a != b)
            if places.size:
                a, b = a[places], b[places]
                differ += int(np.count_nonzero(_ordered(a) != _ordered(b)))  # 0 is -0
                apart += int(np.count_nonzero(np.abs(_ordered(a) - _ordered(b)) > 1))
                largest = max(largest, float(np.abs(to_float32(a) - to_float32(b)).max()))
    return Differences(sum(shapes[0].values()), differ, apart, largest)


def tensors_of(folder: Path) -> dict[str, Bits]:
    """The bits of every tensor, flattened, mapped from the folder's safetensors files. Raises ValueError for another type than bfloat16."""
    found: dict[str, Bits] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{path}: {name} is {entry['dtype']}, and BF16 was to be written")
            offset = 8 + length + entry["data_offsets"][0]
            found[name] = np.memmap(path, np.uint16, "r", offset, (math.prod(entry["shape"]),))
    if not found:
        raise ValueError(f"{folder} holds no tensors: nothing was merged into it")
    return found


def _ordered(bits: Bits) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """Whole numbers that follow each other as the values do; 0 and -0 are one."""
    wide = bits.astype(np.int32)
    return np.where(wide & 0x8000, -(wide & 0x7FFF), wide)
