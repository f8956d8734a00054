"""What the corpus stage holds in memory, and how many rows a second it reads: a mixture of synthetic rows, 10 thousand to a million of them.

    .venv/bin/python jobs/benchmarks/corpus.py
    .venv/bin/python jobs/benchmarks/corpus.py --rows 10000 100000 --repeats 1

Each size is a mixture of three files (ShareGPT, messages and prompt/completion rows as JSON lines, weights 3, 2 and 1) of about 1 kB a row, 2% copies under
new ids and 0.5% malformed rows; copies are left out. The files are made first, then ingested by a process of its own, whose memory is looked at all the while:
private memory is what would be gone with the process, pages of files that the kernel takes back left out. `growth` is the largest size's peak over the
smallest's. One process, one thread of Python. Progress goes to stderr, one JSON line to stdout.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

from fusion_ray.corpus.ingest import ingest
from fusion_ray.corpus.mixture import Source
from fusion_ray.store import Store
from merging_speed.process import run
from speed.line import line, median, metric, progress

ROWS = (10_000, 100_000, 1_000_000)
FILES = {"sharegpt": 3.0, "messages": 2.0, "prompt": 1.0}
COPIES, MALFORMED = 0.02, 0.005
GROWTH = 1.25  # a mixture a hundred times as large may hold a quarter more: the caches that were not full
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="sizes, from small to large")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="a folder for the files; default: a temporary one")
    parser.add_argument("--ingest", nargs=2, metavar=("FILES", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ingest:
        one_corpus(*map(Path, arguments.ingest))
        return
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="corpus-", dir=arguments.work) as folder:
        peaks, rates = {}, {}
        for rows in arguments.rows:
            files, out = Path(folder) / str(rows), Path(folder) / "out"
            write(files, rows)
            command = [sys.executable, __file__, "--ingest", str(files), str(out)]
            # Timed apart from being watched, which holds a process up.
            watched = run(command, watch=True)
            peaks[str(rows)] = watched.peak_private / MB
            progress(f"{rows} rows: {peaks[str(rows)]:.0f} MB")
            _check(out, rows)
            seconds = []
            for _ in range(arguments.repeats):
                shutil.rmtree(out)
                seconds.append(run(command).seconds)
            rates[str(rows)] = rows / median(seconds)
            shutil.rmtree(files)
            shutil.rmtree(out)
            progress(f"{rows} rows: {rates[str(rows)]:.0f} rows/s, start-up included")
    loads.append(os.getloadavg()[0])
    smallest, largest = (peaks[str(rows)] for rows in (arguments.rows[0], arguments.rows[-1]))
    metrics = {
        "peak_mb": metric(peaks, "MB"),
        "rows_per_second": metric(rates, "rows/s"),
        "growth": metric(largest / smallest, "ratio", at_most=GROWTH),
    }
    print(line("corpus", metrics, loads=loads, packages=("pyarrow", "numpy")))


def write(folder: Path, rows: int) -> None:
    """Three files whose rows are `rows` in all, shared out by weight."""
    folder.mkdir(parents=True)
    generator = random.Random(0)
    words = ["".join(generator.choices("aeioubdlmnrst", k=generator.randint(2, 9))) for _ in range(2000)]
    for kind, weight in FILES.items():
        count = round(rows * weight / sum(FILES.values()))
        with (folder / f"{kind}.jsonl").open("w") as file:
            last = ""
            for number in range(count):
                if generator.random() < MALFORMED:
                    file.write('{"id": "broken", "messages": [{"role": "user"\n')
                    continue
                if not last or generator.random() >= COPIES:
                    last = json.dumps([" ".join(generator.choices(words, k=40)) for _ in range(4)])
                file.write(json.dumps(_row(kind, number, json.loads(last))) + "\n")


def _row(kind: str, number: int, texts: list[str]) -> dict[str, object]:
    if kind == "sharegpt":
        speakers = ("human", "gpt", "human", "gpt")
        return {"id": number, "conversations": [{"from": s, "value": t} for s, t in zip(speakers, texts, strict=True)]}
    if kind == "messages":
        roles = ("user", "assistant", "user", "assistant")
        return {"id": number, "messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]}
    return {"id": number, "prompt": " ".join(texts[:2]), "completion": " ".join(texts[2:])}


def one_corpus(files: Path, out: Path) -> None:
    sources = [
        Source(kind, (str(files / f"{kind}.jsonl"),), "auto", "corpus.mixture", weight)
        for kind, weight in FILES.items()
    ]
    ingest(
        Store(str(out)).artifact("corpus", 1, {}, {}),
        mixture=sources,
        format="auto",
        rows_per_shard=256,
        max_rows=None,
        max_rejected=0.05,
        deduplicate=True,
        report=lambda figures: None,
    )


def _check(out: Path, rows: int) -> None:
    """Raises RuntimeError where a row is not accounted for."""
    info = Store(str(out)).artifact("corpus", 1, {}, {}).manifest().info
    sources: dict[str, dict[str, int]] = info["sources"]  # type: ignore[assignment]
    read, copies, bad = (sum(one[name] for one in sources.values()) for name in ("read", "duplicates", "rejected"))
    if abs(read - rows) > len(FILES) or info["rows"] != read - copies - bad or not copies or not bad:
        raise RuntimeError(f"{rows} rows were made, and ingested: {info}")


if __name__ == "__main__":
    main()
