"""The least that a merge can take: every input read once and an output written, by the readers and the writer that merging uses. Run by `merge.py`.

    cd jobs/benchmarks; ../../.venv/bin/python -m merging_speed.floor OUT PIVOT TARGET...

The pivot's tensors are copied out; the targets' are read beside them and left alone. As in a merge, several tensors are under way, one a core, the shard
is hashed as it grows and flushed at its end.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fusion_ray.checkpoints.dtypes import NUMPY_DTYPES
from fusion_ray.checkpoints.plan import PlannedTensor, plan_units
from fusion_ray.checkpoints.reader import SINGLE, open_checkpoint
from fusion_ray.checkpoints.writer import ShardWriter

PIECE = 1 << 19  # elements


def main() -> None:
    out, *folders = sys.argv[1:]
    copy(Path(out), folders)


def copy(out: Path, folders: Sequence[str | Path]) -> None:
    """The tensors of the first folder into one shard, those of the others read and dropped; the small files copied."""
    pivot, *targets = (open_checkpoint(str(folder), model=Path(folder).name) for folder in folders)
    planned = [PlannedTensor(info.name, info.dtype, info.shape, info.size) for info in pivot.tensors.values()]
    (unit,) = plan_units(planned, max_shard_bytes=1 << 62)
    out.mkdir(parents=True)
    with ShardWriter(out / SINGLE, unit) as writer:

        def read(tensor: PlannedTensor) -> str:
            buffer = np.empty(min(PIECE, tensor.size), NUMPY_DTYPES[tensor.dtype])
            for start in range(0, tensor.size, PIECE):
                piece = buffer[: tensor.size - start]
                for target in targets:
                    target.read_into(tensor.name, start, piece)
                pivot.read_into(tensor.name, start, piece)
                writer.write(tensor.name, start, piece)
            return tensor.name

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            for _ in threads.map(read, unit.tensors):
                pass
    for path in Path(folders[0]).iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)


if __name__ == "__main__":
    main()
