"""The speed and the memory of merging: `fusion-ray merge` as a whole process, start-up included, against mergekit, the floor, larger models and two workers.

    .venv/bin/python jobs/benchmarks/merge.py --mergekit-python PATH        # PATH: the interpreter of an environment with mergekit 0.1.5
    .venv/bin/python jobs/benchmarks/merge.py                               # against a plain torch loop
    .venv/bin/python jobs/benchmarks/merge.py --only floor                  # or peers, memory, linearity, stage
    .venv/bin/python jobs/benchmarks/merge.py --only peers --settings sce --repeats 1

A pivot and three targets of 207M parameters (395 MiB each), made once into --work and kept, and the same with every matrix four times as large: 8.3 GB.
Files are read before each pair of runs, so they come from the page cache; `read_from_disk_mb` says where they did not. What a run wrote is on the disk
before the next one starts: ours writes past the page cache and waits for the disk, mergekit leaves that to the system. Outputs go to --out (the disk of
--work) and are removed. Both sides have the same merge file (float32 arithmetic, bfloat16 output, FuseChat's weights and densities); mergekit gets no
options: no trial of it with --lazy-unpickle, --async-write or dtype: bfloat16 was clearly faster. Times are by the clock, medians of the repeats, sides in
turn, and hold only where nothing else has the cores; `processor_seconds` of all threads say more where something has.

`peers`: seconds of both sides and their ratios; VaRM, which nobody else has, against the peer's linear. `differs_*`: the share of positions where the two
outputs differ, and where by more than one unit in the last place of bfloat16. `floor`: against reading all inputs once and writing the output with the
same readers and writer; also the start-up alone, and SCE with nothing compiled yet. `memory`: the most private memory at --max-bytes-in-flight 256MB, the
worst of the methods, libraries counted and pages of model files not. `linearity`: seconds per gigabyte read and written, two models of 0.4 and 1.7 GB,
with --large also of 6.6 GB, which takes 20 GB of disk and 21 GB of memory to stay in the page cache. `stage`: the Ray stage with one and with two workers
held to one core each (and free, where one already uses both), writing to memory where it has room, for a disk does not scale. Goals are those of the
project's issue 4; against the torch loop there are none. All takes about half an hour with mergekit on two cores. Progress goes to stderr, one JSON line to
stdout.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from merging_speed.bench import MB, Bench
from merging_speed.models import MOVED, PIVOT, SIZES, TINY, make_models
from merging_speed.outputs import compare
from merging_speed.process import Finished
from merging_speed.settings import SETTINGS
from merging_speed.sides import BENCHMARKS, MERGEKIT, mergekit, torch_loop
from speed.line import Metric, line, median, metric

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("peers", "floor", "memory", "linearity", "stage")
GOALS = {"linear": 4, "ties": 8, "dare": 8, "sce": 15}  # times faster than mergekit
OURS_ALONE = ("varm", "sce_paper")
VARM_GOAL = 4  # times faster than mergekit's linear
FLOOR_GOALS = {"varm": 2, "sce": 3, "sce_paper": 3}
RANDOM = ("dare",)  # outputs that are not compared
IN_FLIGHT, PEAK_GOAL = "256MB", 700
LINEAR_IN_BYTES = ("varm", "ties")  # they make sense of one target
STAGE_SETTINGS, STAGE_GOAL = ("sce", "ties"), 1.5
MEMORY = Path("/dev/shm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, help="these merges alone")
    parser.add_argument("--mergekit-python", type=Path, metavar="PATH", help="without it the peer is a torch loop")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/benchmarks/merge", help="models are kept here")
    parser.add_argument("--out", type=Path, help="where merged models are written; default: --work")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="linearity also over models of 6.6 GB")
    given = parser.parse_args()
    before = os.getloadavg()
    work = given.work.resolve()
    bench = Bench(
        work=work,
        out=(given.out.resolve() if given.out else work) / f"out-{os.getpid()}",
        peer=mergekit(given.mergekit_python) if given.mergekit_python else torch_loop(),
        repeats=given.repeats,
        settings=tuple(given.settings or SETTINGS),
        sizes=SIZES if given.large else SIZES[:2],
    )
    metrics: dict[str, Metric] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is under way is ended and its output removed
    try:
        for part in [given.only] if given.only else PARTS:
            metrics |= RUNS[part](bench)
    finally:
        shutil.rmtree(bench.out, ignore_errors=True)
    metrics["read_from_disk_mb"] = metric(max((done.from_disk for done in bench.timed), default=0) / MB, "MB")
    loads = (before[0], os.getloadavg()[0])
    print(said(bench, line("merge", metrics, loads=loads, packages=("numpy", "numba", "safetensors", "torch", "ray"))))


def peers(bench: Bench) -> dict[str, Metric]:
    models = make_models(bench.sizes[0], bench.work)
    both, alone = bench.chosen(tuple(GOALS)), bench.chosen(OURS_ALONE)
    bench.warm(models, [*both, *alone])
    if bench.peer.name == MERGEKIT:
        subprocess.run([*bench.peer.command, "--help"], check=True, capture_output=True)  # its libraries are read
    theirs: dict[str, list[Finished]] = {name: [] for name in both}
    ours: dict[str, list[Finished]] = {name: [] for name in [*both, *alone]}
    metrics: dict[str, Metric] = {}
    for repeat in range(bench.repeats):
        for name in both:
            bench.ready(models)
            theirs[name].append(bench.merge(bench.peer, name, models))
            ours[name].append(bench.merge(bench.ours, name, models))
            if repeat == 0 and name not in RANDOM:
                metrics[f"differs_{name}"] = _differs(bench)
        for name in alone:
            bench.ready(models)
            ours[name].append(bench.merge(bench.ours, name, models))
    peer = bench.peer.name
    processor = {}
    for name, done in ours.items():
        metrics[f"{name}_seconds"] = metric(_seconds(done), "s")
        processor[name] = median([each.processor for each in done])
        if name in theirs:
            metrics[f"{name}_seconds_{peer}"] = metric(_seconds(theirs[name]), "s")
            metrics[f"{name}_vs_{peer}"] = _times(theirs[name], done, GOALS[name], bench)
            processor[f"{name}_{peer}"] = median([each.processor for each in theirs[name]])
    if "varm" in ours and "linear" in theirs:
        metrics[f"varm_vs_linear_of_{peer}"] = _times(theirs["linear"], ours["varm"], VARM_GOAL, bench)
    return metrics | {"processor_seconds": metric(processor, "s")}


def floor(bench: Bench) -> dict[str, Metric]:
    models = make_models(bench.sizes[0], bench.work)
    names = bench.chosen(tuple(FLOOR_GOALS))
    bench.warm(models, names)
    bench.floor(models)  # warm too
    least: list[float] = []
    ours: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(bench.repeats):
        bench.ready(models)
        least.append(bench.floor(models).seconds)
        for name in names:
            bench.ready(models)
            ours[name].append(bench.merge(bench.ours, name, models).seconds)
    metrics = {"floor_seconds": metric(median(least), "s")}
    for name in names:
        goal = FLOOR_GOALS[name]
        metrics[f"{name}_vs_floor"] = metric(median(ours[name]) / median(least), "ratio", at_most=goal)
    tiny = make_models(TINY, bench.work)
    started = [bench.merge(bench.ours, "linear", tiny).seconds for _ in range(bench.repeats)]
    metrics["start_up_seconds"] = metric(median(started), "s")
    with tempfile.TemporaryDirectory() as cache:
        bench.ready(models)
        cold = bench.ours.merge(
            bench.config("sce", models), bench.out / bench.ours.name, env={"NUMBA_CACHE_DIR": cache}
        )
    return metrics | {"sce_seconds_nothing_compiled": metric(cold.seconds, "s")}


def memory(bench: Bench) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for size, suffix in zip(bench.sizes[:2], ("", "_4x"), strict=True):
        models = make_models(size, bench.work)
        private, anonymous = {}, {}
        for name in bench.settings:
            done = bench.watched(bench.ours, name, models, "--max-bytes-in-flight", IN_FLIGHT)
            private[name], anonymous[name] = done.peak_private / MB, done.peak_anonymous / MB
        metrics[f"peak_mb{suffix}"] = metric(max(private.values()), "MB", at_most=PEAK_GOAL)
        metrics[f"peak_mb{suffix}_by_method"] = metric(private, "MB")
        metrics[f"peak_anonymous_mb{suffix}_by_method"] = metric(anonymous, "MB")
    if "sce" in bench.settings:
        done = bench.watched(bench.peer, "sce", make_models(bench.sizes[0], bench.work))
        metrics[f"peak_mb_sce_{bench.peer.name}"] = metric(done.peak_private / MB, "MB")
    return metrics


def linearity(bench: Bench) -> dict[str, Metric]:
    rates: dict[str, float] = {}
    names = bench.chosen(LINEAR_IN_BYTES)
    for size in bench.sizes:
        models = make_models(size, bench.work, (PIVOT, next(iter(MOVED))))
        bench.warm(models, names if size is bench.sizes[0] else [])
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(bench.repeats):
            for name in names:
                bench.ready(models)
                times[name].append(bench.merge(bench.ours, name, models).seconds)
        gigabytes = (len(models) + 1) * size.bytes / 1e9
        rates |= {f"{name}_{size.bytes / 1e9:.1f}_gb": median(times[name]) / gigabytes for name in names}
    first, last = (f"{each.bytes / 1e9:.1f}_gb" for each in (bench.sizes[0], bench.sizes[-1]))
    worst = max((rates[f"{name}_{last}"] / rates[f"{name}_{first}"] for name in names), default=1.0)
    return {
        "bytes_linearity": metric(rates, "s/GB"),
        "seconds_per_byte_of_largest_over_smallest": metric(worst, "ratio"),
    }


def stage(bench: Bench) -> dict[str, Metric]:
    names = bench.chosen(STAGE_SETTINGS)
    if not names:
        return {}
    size = bench.sizes[1]
    models = make_models(size, bench.work)
    bench.ready(models)
    has_room = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 3 * size.bytes and _available() > 8 * size.bytes
    out = (MEMORY if has_room else bench.out) / f"fusion-ray-stage-{os.getpid()}"
    pivot, *targets = (str(folder) for folder in models.values())
    command = [sys.executable, "-m", "merging_speed.stage", "--pivot", pivot, "--targets", *targets]
    command += ["--work", str(bench.work / f"stage-{os.getpid()}"), "--out", str(out)]
    command += ["--repeats", str(bench.repeats), "--settings", *names]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=BENCHMARKS)
    kinds: dict[str, dict[str, list[list[float]]]] = json.loads(done.stdout.splitlines()[-1])
    scaling = {f"{name}, {kind}": _scaling(times) for kind, found in kinds.items() for name, times in found.items()}
    held = min(_scaling(times) for times in kinds["one core each"].values())
    seconds = {
        f"{name}_{count}, {kind}": median(each)
        for kind, found in kinds.items()
        for name, times in found.items()
        for count, each in enumerate(times, start=1)
    }
    return {
        "stage_scaling_2_workers": metric(held, "ratio", at_least=STAGE_GOAL),
        "stage_scaling_2_workers_by_method": metric(scaling, "ratio"),
        "stage_seconds_by_method_and_workers": metric(seconds, "s"),
    }


def _scaling(times: Sequence[Sequence[float]]) -> float:
    return median([one / two for one, two in zip(*times, strict=True)])


RUNS: dict[str, Callable[[Bench], dict[str, Metric]]] = {
    "peers": peers,
    "floor": floor,
    "memory": memory,
    "linearity": linearity,
    "stage": stage,
}


def said(bench: Bench, text: str) -> str:
    """The line with the commands that were timed and the versions of the peer."""
    content = json.loads(text)
    content["commands"] = {side.name: side.text for side in (bench.ours, bench.peer)}
    content["versions"] |= bench.peer.versions
    return json.dumps(content)


def _seconds(done: Sequence[Finished]) -> float:
    return median([each.seconds for each in done])


def _times(theirs: Sequence[Finished], ours: Sequence[Finished], goal: float, bench: Bench) -> Metric:
    """How many times faster; the goals are about mergekit."""
    at_least = goal if bench.peer.name == MERGEKIT else None
    return metric(_seconds(theirs) / _seconds(ours), "ratio", at_least=at_least)


def _differs(bench: Bench) -> Metric:
    found = compare(bench.out / bench.ours.name, bench.out / bench.peer.name)
    shares = {
        "positions": found.differ / found.positions,
        "positions_by_more_than_one": found.by_more_than_one / found.positions,
        "largest_absolute": found.largest,
    }
    return metric(shares, "share of positions; absolute")


def _available() -> int:
    rows = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(1024 * int(row.split()[1]) for row in rows if row.startswith("MemAvailable:"))


if __name__ == "__main__":
    main()
