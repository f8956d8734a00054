"""A Hugging Face model folder, read lazily: names, shapes and types from the headers, then ranges of elements where they are needed.

Single `model.safetensors` or shards with `model.safetensors.index.json`. The headers are checked against the file sizes when the folder is opened, so a
truncated file is refused before anything is read. Called by the gates, the plan and the merge worker.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fusion_ray.checkpoints.dtypes import ITEM_BYTES, TORCH_DTYPES
from fusion_ray.checkpoints.errors import MergeError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` is its first byte in `file` (a name within the folder)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """One model: its name in messages, its folder, its config.json and its tensors by name in the order of the files."""

    model: str
    folder: str
    config: dict[str, object]
    tensors: dict[str, TensorInfo]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements `start : stop` of the flattened tensor, (stop - start,) in the stored type. Raises MergeError when the file has become shorter."""
        info = self.tensors[name]
        stop = info.size if stop is None else stop
        item = ITEM_BYTES[info.dtype]
        path = os.path.join(self.folder, info.file)
        buffer = bytearray((stop - start) * item)
        if not buffer:
            return torch.empty(0, dtype=TORCH_DTYPES[info.dtype])
        with open(path, "rb", buffering=0) as file:
            file.seek(info.offset + start * item)
            view, done = memoryview(buffer), 0
            while done < len(buffer):
                count = file.readinto(view[done:])
                if not count:
                    raise MergeError(
                        f"model {self.model!r}: {path} ended while tensor {name!r} was read, and was whole when it was opened: "
                        "do not change model folders while they are merged; run again"
                    )
                done += count
        return torch.frombuffer(buffer, dtype=TORCH_DTYPES[info.dtype])


def open_checkpoint(folder: str, *, model: str) -> Checkpoint:
    """The model in a local folder, from its headers alone. Raises MergeError for a folder that does not hold a whole safetensors model."""
    root = Path(folder)
    config = _read_json(root / "config.json", model)
    tensors: dict[str, TensorInfo] = {}
    for file, listed in _files(root, model).items():
        found = read_header(root / file, model=model)
        if listed is not None:
            _compare_with_index(root, file, listed, set(found), model)
        for name, info in found.items():
            if name in tensors:
                raise MergeError(
                    f"model {model!r}: tensor {name!r} is in {tensors[name].file} and in {file} of {root}: keep one of the two and export again"
                )
            tensors[name] = info
    if not tensors:
        raise MergeError(f"model {model!r}: the safetensors files in {root} hold no tensor")
    return Checkpoint(model, str(folder), config, tensors)


def read_header(path: Path, *, model: str) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Raises MergeError for a file that is truncated, damaged or of an unknown element type."""
    where = f"model {model!r}: {path}"
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise MergeError(
                f"{where} is truncated or not a safetensors file ({size} bytes, header of {length}): download or export it again"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise MergeError(f"{where} has a damaged header ({error}): download or export it again") from error
    header.pop("__metadata__", None)
    infos: dict[str, TensorInfo] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in ITEM_BYTES:
            raise MergeError(
                f"{where}: tensor {name!r} has the element type {dtype}; merging takes {', '.join(ITEM_BYTES)}: export the model dequantised"
            )
        infos[name] = TensorInfo(name, dtype, shape, path.name, 8 + length + start)
        if start != end or stop - start != infos[name].bytes:
            raise MergeError(
                f"{where}: the header's offsets of tensor {name!r} do not fit its shape {list(shape)}: export it again"
            )
        end = stop
    if size != 8 + length + end:
        last = next((name for name, info in infos.items() if info.offset + info.bytes > size), None)
        at = f"; it ends within tensor {last!r}" if last else ""
        raise MergeError(
            f"{where} is truncated or damaged: {size} bytes, its header says {8 + length + end}{at}: download or export it again"
        )
    return infos


def _files(root: Path, model: str) -> dict[str, set[str] | None]:
    """The files of the model, each with the tensors that the index lists for it (None without an index). A single file comes first, as in transformers."""
    if (root / SINGLE).is_file():
        return {SINGLE: None}
    if not (root / INDEX).is_file():
        others = sorted(path.name for path in root.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = (
            f" (it has {', '.join(others)}: convert to safetensors, pickled weights are never loaded)" if others else ""
        )
        raise MergeError(f"model {model!r}: {root} holds neither {SINGLE} nor {INDEX}{hint}")
    weight_map = _read_json(root / INDEX, model).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MergeError(f"model {model!r}: {root / INDEX} has no `weight_map`: export the model again")
    files: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        if os.path.basename(str(file)) != file:
            raise MergeError(
                f"model {model!r}: {root / INDEX} leads out of the folder with {file!r} for tensor {name!r}"
            )
        listed = files.setdefault(file, set())
        assert listed is not None
        listed.add(name)
    for file in files:
        if not (root / file).is_file():
            raise MergeError(
                f"model {model!r}: the shard {file} that {root / INDEX} lists is missing: download or export it again"
            )
    return dict(sorted(files.items()))


def _compare_with_index(root: Path, file: str, listed: set[str], found: set[str], model: str) -> None:
    for names, problem in (
        (listed - found, "is listed for it but not in it"),
        (found - listed, "is in it but not listed"),
    ):
        if names:
            raise MergeError(
                f"model {model!r}: {root / file} and {INDEX} differ: tensor {min(names)!r} {problem} "
                f"({len(names)} in all): download or export the model again"
            )


def _read_json(path: Path, model: str) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MergeError(
            f"model {model!r}: cannot read {path}: {error.strerror or error}; give a Hugging Face model folder"
        ) from error
    except ValueError as error:
        raise MergeError(f"model {model!r}: {path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise MergeError(f"model {model!r}: {path} must hold a JSON object")
    return value
