"""A Hugging Face model folder, read lazily: names, shapes and types from the headers, then ranges of elements where they are needed.

Single `model.safetensors` or shards with `model.safetensors.index.json`, on this machine or in an object store. The headers are checked against the file
sizes when the folder is opened, so a truncated file is refused before anything is read. Called by the gates, the plan and the merge worker.
"""

import json
import math
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusion_ray.checkpoints.dtypes import ITEM_BYTES, NUMPY_DTYPES
from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.checkpoints.files import Files, files_of
from fusion_ray.places import PlaceError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTERS = {"adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"}
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
    """One model: its name in messages, its files, its config.json and its tensors by name in the order of the files."""

    model: str
    files: Files
    config: dict[str, object]
    tensors: dict[str, TensorInfo]

    @property
    def folder(self) -> str:
        return self.files.root

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.generic]:
        """Elements `start : stop` of the flattened tensor, (stop - start,) as they are stored. Raises as `read_into`."""
        info = self.tensors[name]
        values = np.empty((info.size if stop is None else stop) - start, NUMPY_DTYPES[info.dtype])
        self.read_into(name, start, values)
        return values

    def read_into(self, name: str, start: int, values: npt.NDArray[np.generic]) -> None:
        """The elements from `start` on, as many as `values` (n,) has room for. Raises MergeError when the file has become shorter."""
        info = self.tensors[name]
        if not values.size:
            return
        buffer = values.view(np.uint8).data
        self._check_whole(info, len(buffer), self.files.read_into(info.file, _place(info, start), buffer))

    def mapped(self, name: str, start: int, stop: int) -> npt.NDArray[np.generic] | None:
        """Elements `start : stop` as they lie in the file, nothing copied: read when they are looked at. None where that cannot be. Raises as `read_into`."""
        info = self.tensors[name]
        count = (stop - start) * ITEM_BYTES[info.dtype]
        found = self.files.mapped(info.file, _place(info, start), count)
        if found is None or info.offset % ITEM_BYTES[info.dtype]:
            return None
        self._check_whole(info, count, len(found))
        return np.frombuffer(found, NUMPY_DTYPES[info.dtype])

    def expect(self, name: str, start: int, stop: int) -> None:
        """These elements of a mapped tensor will be looked at soon."""
        info = self.tensors[name]
        self.files.expect(info.file, _place(info, start), (stop - start) * ITEM_BYTES[info.dtype])

    def _check_whole(self, info: TensorInfo, wanted: int, found: int) -> None:
        if found < wanted:
            raise MergeError(
                f"model {self.model!r}: {self.folder}/{info.file} ended while tensor {info.name!r} was read, and was whole when it was opened: "
                "do not change model folders while they are merged; run again"
            )


def open_checkpoint(folder: str, *, model: str) -> Checkpoint:
    """The model in a folder, from its headers alone. Raises MergeError for a folder that does not hold a whole safetensors model."""
    try:
        return _open(folder, model)
    except PlaceError as error:
        raise MergeError(f"model {model!r}: {error}") from error
    except OSError as error:
        raise MergeError(
            f"model {model!r}: cannot read {folder}: {error.strerror or error} ({error.filename}); give a Hugging Face model folder that may be read"
        ) from error


def _open(folder: str, model: str) -> Checkpoint:
    files = files_of(folder)
    root = files.root
    names = set(files.names())
    if ADAPTERS & names and not {SINGLE, INDEX} & names:
        raise MergeError(
            f"model {model!r}: {root} holds only a LoRA adapter ({min(ADAPTERS & names)}), and adapters are not applied: merge it into its model first "
            "(peft's merge_and_unload, then save_pretrained) and name that folder"
        )
    config = _read_json(files, "config.json", model)
    tensors: dict[str, TensorInfo] = {}
    for file, listed in _shards(files, names, model).items():
        found = read_header(files, file, model=model)
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
    return Checkpoint(model, files, config, tensors)


def read_header(files: Files, name: str, *, model: str) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Raises MergeError for a file that is truncated, damaged or of an unknown element type."""
    where = f"model {model!r}: {files.root}/{name}"
    size = files.size(name)
    length = int.from_bytes(_bytes(files, name, 0, min(size, 8)), "little")
    if size < 8 or length > min(size - 8, _LARGEST_HEADER):
        raise MergeError(
            f"{where} is truncated or not a safetensors file ({size} bytes, header of {length}): download or export it again"
        )
    try:
        header = json.loads(_bytes(files, name, 8, length))
    except ValueError as error:
        raise MergeError(f"{where} has a damaged header ({error}): download or export it again") from error
    if not isinstance(header, dict):
        raise MergeError(
            f"{where} has a damaged header (it holds {_short(header)}, and tensors by name were expected): download or export it again"
        )
    header.pop("__metadata__", None)
    for tensor, entry in header.items():
        if not _is_entry(entry):
            raise MergeError(
                f"{where} has a damaged header (of tensor {tensor!r} it says {_short(entry)}, and `dtype`, `shape` and `data_offsets` were expected): "
                "download or export it again"
            )
    infos: dict[str, TensorInfo] = {}
    end = 0
    for tensor, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in ITEM_BYTES:
            raise MergeError(
                f"{where}: tensor {tensor!r} has the element type {dtype}; merging takes {', '.join(ITEM_BYTES)}: export the model dequantised"
            )
        infos[tensor] = TensorInfo(tensor, dtype, shape, name, 8 + length + start)
        if start != end or stop - start != infos[tensor].bytes:
            raise MergeError(
                f"{where}: the header's offsets of tensor {tensor!r} do not fit its shape {list(shape)}: export it again"
            )
        end = stop
    if size != 8 + length + end:
        last = next((each for each, info in infos.items() if info.offset + info.bytes > size), None)
        at = f"; it ends within tensor {last!r}" if last else ""
        raise MergeError(
            f"{where} is truncated or damaged: {size} bytes, its header says {8 + length + end}{at}: download or export it again"
        )
    return infos


def _is_entry(entry: object) -> bool:
    """Whether it has the form of a header's entry."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(each) is int and each >= 0 for each in (*shape, *offsets))


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shards(files: Files, names: set[str], model: str) -> dict[str, set[str] | None]:
    """The files of the model, each with the tensors that the index lists for it (None without an index). A single file comes first, as in transformers."""
    root = files.root
    if SINGLE in names:
        return {SINGLE: None}
    if INDEX not in names:
        others = sorted(name for name in names if "/" not in name and name.endswith((".bin", ".pt", ".pth", ".gguf")))
        hint = (
            f" (it has {', '.join(others)}: convert to safetensors, pickled weights are never loaded)" if others else ""
        )
        raise MergeError(f"model {model!r}: {root} holds neither {SINGLE} nor {INDEX}{hint}")
    weight_map = _read_json(files, INDEX, model).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MergeError(f"model {model!r}: {root}/{INDEX} has no `weight_map`: export the model again")
    shards: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        if os.path.basename(str(file)) != file:
            raise MergeError(
                f"model {model!r}: {root}/{INDEX} leads out of the folder with {file!r} for tensor {name!r}"
            )
        listed = shards.setdefault(file, set())
        assert listed is not None
        listed.add(name)
    for file in shards:
        if file not in names:
            raise MergeError(
                f"model {model!r}: the shard {file} that {root}/{INDEX} lists is missing: download or export it again"
            )
    return dict(sorted(shards.items()))


def _compare_with_index(root: str, file: str, listed: set[str], found: set[str], model: str) -> None:
    for names, problem in (
        (listed - found, "is listed for it but not in it"),
        (found - listed, "is in it but not listed"),
    ):
        if names:
            raise MergeError(
                f"model {model!r}: {root}/{file} and {INDEX} differ: tensor {min(names)!r} {problem} "
                f"({len(names)} in all): download or export the model again"
            )


def _place(info: TensorInfo, start: int) -> int:
    return info.offset + start * ITEM_BYTES[info.dtype]


def _bytes(files: Files, name: str, offset: int, count: int) -> bytes:
    buffer = bytearray(count)
    done = files.read_into(name, offset, memoryview(buffer))
    return bytes(buffer[:done])


def _read_json(files: Files, name: str, model: str) -> dict[str, object]:
    path = f"{files.root}/{name}"
    try:
        value = json.loads(files.read(name).decode())
    except PlaceError:
        raise
    except OSError as error:
        raise MergeError(
            f"model {model!r}: cannot read {path}: {error.strerror or error}; give a Hugging Face model folder"
        ) from error
    except ValueError as error:
        raise MergeError(f"model {model!r}: {path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise MergeError(f"model {model!r}: {path} must hold a JSON object")
    return value
