"""Who merges: this project's command, mergekit from its own environment, a torch loop, and the floor that only reads and writes. Called by `merge.py`."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from merging_speed.process import Finished, run

BENCHMARKS = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1"}  # models are folders: nobody has to ask the hub
MERGEKIT = "mergekit"
TORCH_LOOP = "torch_loop"


@dataclass(frozen=True)
class Side:
    """A command that takes a merge file and a folder to write; `options` come after them."""

    name: str
    command: tuple[str, ...]
    options: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The command as one would type it, without the places of the programs."""
        first, *rest = self.command
        return " ".join([Path(first).name, *rest, "MERGE.yml", "OUT", *self.options])

    def merge(
        self,
        config: Path,
        out: Path,
        *options: str,
        env: Mapping[str, str] | None = None,
        watch: bool = False,
        models: Path | None = None,
    ) -> Finished:
        """Merge into a new folder, from the process's start to its end. Pages that are mapped from files below `models` are not its memory."""
        shutil.rmtree(out, ignore_errors=True)
        command = [*self.command, str(config), str(out), *self.options, *options]
        cache = out.with_name("cache")  # of what earlier merges measured: every run is a first one
        shutil.rmtree(cache, ignore_errors=True)
        variables = os.environ | ENVIRONMENT | {"FUSION_RAY_CACHE": str(cache)} | dict(env or {})
        done = run(command, cwd=BENCHMARKS, env=variables, watch=watch, leave_out=models)
        if not any(out.glob("*.safetensors")):
            raise RuntimeError(f"{' '.join(command)} ended well and wrote no model")
        return done


def fusion_ray() -> Side:
    beside = Path(sys.executable).with_name("fusion-ray")
    command = (str(beside),) if beside.exists() else (sys.executable, "-m", "fusion_ray.cli")
    return Side("fusion_ray", (*command, "merge"), ("--no-check",))


def mergekit(python: Path) -> Side:
    """Raises RuntimeError where that interpreter has no mergekit."""
    asked = "from importlib.metadata import version; print(*map(version, ('mergekit', 'torch', 'transformers')))"
    said = subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=False)
    if said.returncode:
        raise RuntimeError(
            f"--mergekit-python {python}: it has no mergekit ({said.stderr.strip().splitlines()[-1]}): "
            "give the interpreter of an environment with mergekit 0.1.5"
        )
    names = ("mergekit", "mergekit_torch", "mergekit_transformers")
    versions = dict(zip(names, said.stdout.split(), strict=True))
    return Side(MERGEKIT, (str(python), "-m", "mergekit.scripts.run_yaml"), versions=versions)


def torch_loop() -> Side:
    return Side(TORCH_LOOP, (sys.executable, "-m", "merging_speed.torch_loop"))


def read_and_write(models: Mapping[str, Path], out: Path) -> Finished:
    """The floor over these models, the pivot first."""
    shutil.rmtree(out, ignore_errors=True)
    folders = [str(folder) for folder in models.values()]
    return run([sys.executable, "-m", "merging_speed.floor", str(out), *folders], cwd=BENCHMARKS)
