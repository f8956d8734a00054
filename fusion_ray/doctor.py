"""What of the environment works (`fusion-ray doctor`): one line a check. Engines are imported in processes of their own, side by side."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30
NEEDED_MEMORY_GIB = 8  # two engines, a training group and Ray on the zoo
NEEDED_DISK_GIB = 2

# What each engine must be able to do, beyond being importable.
ENGINES = {
    "torch": "import torch; print(torch.__version__, 'cuda' if torch.cuda.is_available() else 'cpu', torch.get_num_threads(), 'threads')",
    "transformers": "import transformers; from transformers import AutoModelForCausalLM; print(transformers.__version__)",
    "ray": "import ray, ray.data, ray.train; print(ray.__version__)",
    "vllm": "import vllm; from vllm.platforms import current_platform; print(vllm.__version__, current_platform.device_type)",
    "deepspeed": "import deepspeed; print(deepspeed.__version__)",
    "serve": "import ray.serve.llm; print('ray.serve.llm imports')",
}


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    detail: str


def examine(storage: str = "runs") -> Iterator[Check]:
    """Every check, cheap ones first."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    yield Check(
        "python", sys.version_info[:2] in {(3, 11), (3, 12)}, f"{version} at {sys.executable} (3.11 or 3.12 wanted)"
    )
    yield _memory()
    yield _disk(storage)
    compiler = shutil.which("g++") or shutil.which("c++")
    yield Check(
        "compiler",
        compiler is not None,
        compiler or "no g++: DeepSpeed builds its operators with it; install a C++ compiler",
    )
    yield _shared_memory()
    token = os.environ.get("RAY_AUTH_MODE", "unset: a run's own local cluster uses a token of its own")
    yield Check("ray auth", True, f"RAY_AUTH_MODE {token}")
    environment = os.environ | {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"), "VLLM_NO_USAGE_STATS": "1"}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for name, code in ENGINES.items()
    }
    for name, process in processes.items():
        out, err = process.communicate()
        ok = process.returncode == 0
        words = (out if ok else err).strip().splitlines() or ["no output"]
        yield Check(name, ok, words[-1] if ok else f"{words[-1]} (run requirements/setup.sh again)")


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    cores = len(os.sched_getaffinity(0))
    return Check(
        "machine", total >= NEEDED_MEMORY_GIB, f"{cores} cores, {total:.0f} GiB memory ({NEEDED_MEMORY_GIB} GiB wanted)"
    )


def _disk(storage: str) -> Check:
    folder = Path(storage).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            writable = True
    except OSError:
        writable = False
    detail = (
        f"{folder} is {'writable' if writable else 'not writable'}, {free:.0f} GiB free ({NEEDED_DISK_GIB} GiB wanted)"
    )
    return Check("storage", writable and free >= NEEDED_DISK_GIB, detail)


def _shared_memory() -> Check:
    path = Path("/dev/shm")
    if not path.exists():
        return Check("shm", False, "no /dev/shm: Ray's object store wants it; in a container give --shm-size")
    free = shutil.disk_usage(path).free / GIB
    return Check("shm", free >= 1, f"/dev/shm has {free:.1f} GiB free (1 GiB wanted; in a container give --shm-size)")
