"""The layers of design.md section 2, held by reading every module's imports and by importing what must stay light in a process of its own."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fusion_ray"
PURE = ("logprobs", "alignment", "losses", "merging", "judging")

# Imports point down only: a part may import parts of a lower number, and itself. A new part must be given its place here.
LEVELS = {
    **dict.fromkeys(("config", "records", "places"), 0),
    **dict.fromkeys((*PURE, "store", "models"), 1),
    **dict.fromkeys(("corpus", "checkpoints", "graph", "report", "merge_file", "merge_recipe", "merge_template"), 2),
    **dict.fromkeys(("merge_yaml", "find_artifact", "tokens"), 3),
    **dict.fromkeys(("workers", "zoo", "schedule"), 4),
    **dict.fromkeys(("stages", "progress", "merge_folder", "inspect_artifact", "exchange"), 5),
    **dict.fromkeys(("pipeline", "plan", "merge_command"), 6),
    **dict.fromkeys(("summary", "views", "doctor"), 7),
    "cli": 8,
}
# What a PURE package may import: arrays and arithmetic. No files, no clock, no logging, no global randomness, no collectives.
PURE_THIRD_PARTY = {"numpy", "numba", "llvmlite", "torch", "pyarrow", "rapidfuzz"}
PURE_FORBIDDEN_STDLIB = set(
    """asyncio datetime glob http logging multiprocessing os pathlib pickle random secrets shelve shutil signal socket sqlite3 subprocess sys
    tempfile threading time urllib uuid""".split()  # noqa: SIM905  # a list of twenty quoted words is harder to read
)
HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers", "numba", "altair")


def imports_of(source: str) -> set[str]:
    """Every module that `source` imports, at any depth, with dots; `from a import b` counts as a and as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
            found |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names if not name.startswith(".")}


def part_of(module: str) -> str:
    """fusion_ray.stages.teach -> stages."""
    return module.split(".")[1]


def problems(module: str, source: str) -> Iterator[str]:
    """What breaks the layers in one module of the package, in words."""
    part = part_of(module)
    names = imports_of(source)
    if any(name.startswith(".") for name in names):
        yield f"{module}: relative import"
    if part not in LEVELS:
        yield f"{module}: the part {part!r} has no level"
        return
    for other in sorted({part_of(name) for name in names if name.startswith("fusion_ray.")} - {part}):
        if other not in LEVELS:
            yield f"{module}: imports the unknown part {other!r}"
        elif LEVELS[other] >= LEVELS[part]:
            yield f"{module}: {part} (level {LEVELS[part]}) imports {other} (level {LEVELS[other]})"
    if "ray" in roots(names) and part != "stages":
        yield f"{module}: imports ray outside stages"
    if {"vllm", "deepspeed"} <= roots(names):
        yield f"{module}: imports vllm and deepspeed"
    if part in PURE:
        yield from pure_problems(module, source, names)


def pure_problems(module: str, source: str, names: set[str]) -> Iterator[str]:
    standard = roots(names) & set(sys.stdlib_module_names)
    for name in sorted(roots(names) - standard - PURE_THIRD_PARTY - {"fusion_ray"}):
        yield f"{module}: a PURE package imports {name}"
    for name in sorted(standard & PURE_FORBIDDEN_STDLIB):
        yield f"{module}: a PURE package imports {name}"
    if any(name == "torch.distributed" or name.startswith("torch.distributed.") for name in names):
        yield f"{module}: a PURE package imports torch.distributed"
    if any(name == "fusion_ray.config" or name.startswith("fusion_ray.config.") for name in names):
        yield f"{module}: a PURE package imports config objects"
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("open", "print", "input")
        ):
            yield f"{module}:{node.lineno}: a PURE package calls {node.func.id}()"


def modules() -> dict[str, Path]:
    """Dotted name to file, of every module of the package (zoo's model folders hold none)."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__init__":
            found[".".join(parts)] = path
    return found


MODULES = modules()


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 20
    assert {part_of(module) for module in MODULES} >= {"stages", "workers", "report", *PURE}


@pytest.mark.parametrize("module", list(MODULES))
def test_imports_point_down(module: str) -> None:
    assert list(problems(module, MODULES[module].read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fusion_ray.workers.teacher", "def f():\n    import ray"),
        ("fusion_ray.workers.teacher", "from ray import data"),
        ("fusion_ray.workers.trainer", "import vllm\nimport deepspeed"),
        ("fusion_ray.workers.trainer", "from fusion_ray.stages.teach import teach"),
        ("fusion_ray.workers.trainer", "from fusion_ray.stages import teach"),
        ("fusion_ray.store", "from fusion_ray import pipeline"),
        ("fusion_ray.losses.head", "from fusion_ray.merging.varm import varm"),
        ("fusion_ray.losses.head", "import torch.distributed as dist"),
        ("fusion_ray.losses.head", "from torch import distributed"),
        ("fusion_ray.losses.head", "import logging"),
        ("fusion_ray.losses.head", "from fusion_ray.config import DistillConfig"),
        ("fusion_ray.judging.scores", "import openai"),
        ("fusion_ray.judging.questions", "x = open('q.jsonl')"),
        ("fusion_ray.corpus.readers", "from .rows import parse"),
        ("fusion_ray.novelty", "import numpy"),
    ],
)
def test_the_check_catches(module: str, source: str) -> None:
    assert list(problems(module, source))


def test_vllm_and_deepspeed_never_meet_through_other_modules() -> None:
    direct = {module: imports_of(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}

    def reached(module: str, seen: set[str]) -> set[str]:
        """Third-party roots that importing `module` and what it imports of the package brings in; entry points choose at run time."""
        seen.add(module)
        found = roots(direct[module]) & {"vllm", "deepspeed"}
        for name in direct[module]:
            if name in direct and name not in seen:
                found |= reached(name, seen)
        return found

    both = [
        module
        for module in MODULES
        if LEVELS[part_of(module)] <= LEVELS["stages"] and {"vllm", "deepspeed"} <= reached(module, set())
    ]
    assert both == []


def test_init_files_are_empty() -> None:
    filled = [str(path.relative_to(ROOT)) for path in PACKAGE.rglob("__init__.py") if path.read_bytes().strip()]
    assert filled == []


def test_jobs_import_only_the_command_line_and_the_standard_library() -> None:
    for path in (ROOT / "jobs").glob("*.py"):
        if path.name == "zoo.py":  # makes the zoo's models; no part of a run
            continue
        names = imports_of(path.read_text(encoding="utf-8"))
        assert roots(names) <= set(sys.stdlib_module_names) | {"fusion_ray"}, path.name
        assert {part_of(name) for name in names if name.startswith("fusion_ray.")} <= {"cli"}, path.name


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_pure_packages_import_without_engines() -> None:
    names = [module for module in MODULES if part_of(module) in PURE]
    code = (
        "import sys, importlib\n"
        "for name in ('ray', 'vllm', 'deepspeed'): sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["cli", "config", "graph", "records", "merge_yaml", "merging.parameters"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    if f"fusion_ray.{module}" not in MODULES:
        pytest.fail(f"fusion_ray/{module}.py is missing")
    done = run_python(f"import sys, fusion_ray.{module}\nprint([name for name in {HEAVY!r} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
