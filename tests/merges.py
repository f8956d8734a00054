"""Small model folders and merge files in a test's folder, and the two ways to merge them: `merge` (the function) and `command` (the command line)."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fusion_ray.checkpoints.reader import open_checkpoint
from fusion_ray.cli import main
from fusion_ray.merge_command import Merged, merge_file
from tests.folders import moved, random_tensors, write_model

BOUND = 1 << 22
SHARD = 20_000


def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep statistics in the test's folder, and no lines of progress, however slow the machine; where the statistics are."""
    monkeypatch.setattr("fusion_ray.progress.LINE_EVERY", 1e9)
    monkeypatch.setenv("FUSION_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_models(
    folder: Path, *names: str, dtype: torch.dtype = torch.bfloat16, rows: int = 300, width: int = 32, **config: object
) -> None:
    """A model for each name: the first one random, the others a small change of it each."""
    first = random_tensors(0, rows=rows, width=width, dtype=dtype)
    for seed, name in enumerate(names):
        write_model(folder / name, moved(first, seed) if seed else first, vocab_size=rows, **config)  # type: ignore[arg-type]  # of the config, not shards


def write_merge(path: Path, method: str, models: Mapping[str, Mapping[str, object]], **content: object) -> Path:
    """A merge file: `models` are paths or hub ids with their parameters, `content` its other keys."""
    listed = [{"model": name} | ({"parameters": dict(given)} if given else {}) for name, given in models.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"merge_method": method, "models": listed, **content}))
    return path


def varm_of(folder: Path, *targets: str, **content: object) -> Path:
    """A merge file beside the models: VaRM of the targets onto `base`."""
    return write_merge(folder / "merge.yml", "varm", {name: {} for name in targets}, base_model="base", **content)


def merge(
    path: Path, out: Path, *, bound: int = BOUND, shard: int = SHARD, threads: int = 2, overwrite: bool = False
) -> Merged:
    return merge_file(
        path,
        out,
        max_bytes_in_flight=bound,
        max_shard_bytes=shard,
        threads=threads,
        overwrite=overwrite,
        report=lambda figures: None,
    )


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `fusion-ray merge ARGUMENTS`."""
    code = main(["merge", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def hashes(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    """sha256 of the files below the folder, by their relative names; without the one that says how a merge came about."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file() and path.name != "reused.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a file was touched."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def is_whole(folder: Path) -> bool:
    """The reader of models takes it, and nothing lies about that a merge needs only while it runs."""
    leftovers = ("_units", "_statistics", "merge.json")
    open_checkpoint(str(folder), model="merged")
    return not [path for path in folder.rglob("*") if path.name in leftovers or ".tmp-" in path.name]
