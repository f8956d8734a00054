"""The models that merging is timed on: a random Llama as the pivot and targets that moved from it a little. Called by `merge.py` and its test.

Every value follows from the numbers of its tensor, its piece and its model, so the files are the same on any machine. They are written piece by piece:
making a model of 7 GB takes 100 MB. Weights have a deviation of 0.02 and norms are near 1, all in bfloat16; a target's weights moved by 1e-3 to 2e-3,
some eight units in the last place, each target by another amount, so that no two weigh the same. Config, tokenizer and template are the zoo pivot's.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fusion_ray.zoo.catalogue import MODELS
from speed.line import progress

PIVOT = "pivot"
MOVED = {"target1": 1.0e-3, "target2": 1.5e-3, "target3": 2.0e-3}  # the deviation of each target's changes
DEVIATION, NORM_DEVIATION = 0.02, 0.05
PIECE = 1 << 22  # elements that are drawn at a time
HEAD = 64  # of an attention head
FORMAT = 1  # raised where the same size gets other values
RECORD = "made.json"
SPARE = 2 << 30

Bits = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Size:
    """The shape of a Llama with half as many key and value heads as heads."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, in the order of the file."""
        half = self.hidden // 2
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            shapes |= {
                f"{name}.input_layernorm.weight": (self.hidden,),
                f"{name}.mlp.down_proj.weight": (self.hidden, self.intermediate),
                f"{name}.mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{name}.mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{name}.post_attention_layernorm.weight": (self.hidden,),
                f"{name}.self_attn.k_proj.weight": (half, self.hidden),
                f"{name}.self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{name}.self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{name}.self_attn.v_proj.weight": (half, self.hidden),
            }
        return shapes | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Of one model's tensors."""
        return 2 * self.parameters

    @property
    def config(self) -> dict[str, object]:
        heads = self.hidden // HEAD
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "head_dim": HEAD,
            "vocab_size": self.vocabulary,
        }


TINY = Size("tiny", 128, 256, 2, 1024)  # 0.6 MB: what is left is the start of the process
SIZES = (
    Size("small", 1024, 2816, 12, 32_000),  # 207M parameters
    Size("medium", 2048, 5632, 12, 64_000),  # every matrix four times as large
    Size("large", 4096, 11264, 12, 128_000),  # sixteen times
)


def make_models(size: Size, work: Path, names: tuple[str, ...] = (PIVOT, *MOVED)) -> dict[str, Path]:
    """The folders of these models by name, made where they are not there yet. Raises OSError where the disk has no room for them."""
    folders = {name: work / size.name / name for name in names}
    missing = [name for name, folder in folders.items() if not _is_made(size, name, folder)]
    check_room(work, len(missing) * size.bytes)
    for name in missing:
        progress(f"making {size.name}/{name}: {size.parameters / 1e6:.1f}M parameters, {size.bytes / 2**20:.0f} MiB")
        _make(size, name, folders[name])
    return folders


def check_room(folder: Path, needed: int) -> None:
    """Raises OSError where the disk of `folder` has less than `needed` bytes and a little."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed and free < needed + SPARE:
        raise OSError(
            f"{folder}: {(needed + SPARE) / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: make room, give another --work, or leave --large out"
        )


def read_once(folders: list[Path]) -> int:
    """Read every file of the folders, so that they are in the page cache where it has room; the bytes read."""
    count = 0
    buffer = bytearray(1 << 22)
    for folder in folders:
        for path in sorted(folder.iterdir()):
            with open(path, "rb", buffering=0) as file:
                while got := file.readinto(buffer):
                    count += got
    return count


def values(size: Size, model: str, number: int) -> Iterator[Bits]:
    """The bits of tensor `number` of a model in bfloat16, piece by piece."""
    shape = list(size.tensors.values())[number]
    count = math.prod(shape)
    norm = len(shape) == 1
    for piece, start in enumerate(range(0, count, PIECE)):
        length = min(PIECE, count - start)
        drawn = _drawn((0, number, piece), length, NORM_DEVIATION if norm else DEVIATION)
        if norm:
            drawn += 1
        bits = to_bfloat16(drawn)
        if model != PIVOT:
            place = list(MOVED).index(model) + 1
            bits = to_bfloat16(to_float32(bits) + _drawn((place, number, piece), length, MOVED[model]))
        yield bits


def to_bfloat16(floats: npt.NDArray[np.float32]) -> Bits:
    """The nearest bfloat16, ties to even; finite values only."""
    bits = floats.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def to_float32(bits: Bits) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _drawn(seed: tuple[int, ...], count: int, deviation: float) -> npt.NDArray[np.float32]:
    drawn = np.random.default_rng(seed).standard_normal(count, np.float32)
    drawn *= np.float32(deviation)
    return drawn


def _record(size: Size, name: str) -> dict[str, object]:
    return {"format": FORMAT, "model": name, **asdict(size)}


def _is_made(size: Size, name: str, folder: Path) -> bool:
    record = folder / RECORD
    return record.is_file() and json.loads(record.read_text(encoding="utf-8")) == _record(size, name)


def _make(size: Size, name: str, folder: Path) -> None:
    """Written beside its place and renamed."""
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        config = json.loads((MODELS / PIVOT / "config.json").read_text(encoding="utf-8")) | size.config
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in sorted((MODELS / PIVOT).iterdir()):
            if path.name.startswith(("tokenizer", "chat_template", "generation_config")):
                shutil.copyfile(path, temporary / path.name)
        with open(temporary / "model.safetensors", "wb") as file:
            file.write(_header(size))
            for number in range(len(size.tensors)):
                for bits in values(size, name, number):
                    file.write(bits.data)
            file.flush()
            os.fsync(file.fileno())
        (temporary / RECORD).write_text(json.dumps(_record(size, name), indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _header(size: Size) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in size.tensors.items():
        end = offset + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
