"""The speed of the papers' alignment: the compiled programme against the plain-Python one that was published, the map `min_edit`, the counts.

    .venv/bin/python jobs/benchmarks/align_fusechat.py              # about three minutes
    .venv/bin/python jobs/benchmarks/align_fusechat.py --text FILE  # JSON lines of GSM8K, or of the zoo's corpus

Mistral's SentencePiece (32k, the pivot) against Tekken (131k, the source) on real text. Rows of 150 and of 2,048 pivot tokens go from ids to matches
in both programmes, in turn in one run; their matches are compared first. `_lists`: against the fastest shape that plain Python allows. Times are of one
core (processor time of the process), figures medians of the repeats. Goals are those of the project's issue 3. Progress goes to stderr, one JSON line
to stdout. `jobs/benchmarks/align.py` has the same figures among its own.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fusion_ray.alignment.counts import PairCounts
from fusion_ray.alignment.fusechat import met_pairs
from fusion_ray.alignment.maps import min_edit_map
from fusion_ray.alignment.programme import match_tokens
from fusion_ray.alignment.token_strings import TokenStrings
from fusion_ray.zoo.catalogue import CORPUS
from speed.line import Metric, line, median, metric, progress, timed
from speed.published_programme import in_lists, published
from speed.teacher_tables import (
    TextModel,
    read_texts,
    sentencepiece_model,
    sentencepiece_strings,
    tekken_model,
    tekken_strings,
    texts_of_length,
)

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
ROWS = {150: 64, 2048: 1}  # pivot tokens of a row, and rows of a repeat
GOAL = 100
COUNTED = 2_000  # rows of 150 tokens over which pairs are counted
COLUMNS = 16  # bytes of a pair
Row = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]  # source ids, pivot ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=GSM8K if GSM8K.exists() else CORPUS, help="JSON lines of GSM8K")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    before = os.getloadavg()
    metrics = fusechat(read_texts(given.text), repeats=given.repeats)
    loads = (before[0], os.getloadavg()[0])
    print(line("align_fusechat", metrics, loads=loads, packages=("numpy", "numba", "rapidfuzz")))


def fusechat(texts: Sequence[str], *, repeats: int) -> dict[str, Metric]:
    """All figures of this file."""
    pivot, source = sentencepiece_model(), tekken_model()
    strings = tekken_strings(), sentencepiece_strings()
    metrics: dict[str, Metric] = {}
    for length, count in ROWS.items():
        rows = _rows(texts, source, pivot, length=length, count=count)
        metrics |= _speedup(rows, *strings, length=length, repeats=repeats)
    counts = PairCounts.none()
    for mine, theirs in _rows(texts, source, pivot, length=150, count=COUNTED):
        counts = counts + PairCounts.of_pairs(*met_pairs(match_tokens(mine, theirs, *strings), theirs, mine))
    progress("fusechat: counted")
    for name, words in (("32k_131k", (pivot, source)), ("131k_32k", (source, pivot))):
        (built,) = timed(lambda: min_edit_map(*(replace(model.vocabulary) for model in words)), repeats=3)  # noqa: B023  # called here
        metrics[f"min_edit_seconds_{name}"] = metric(median(built.processor), "s", at_most=60)
        progress(f"fusechat: min_edit {name}")
    return metrics | {
        "pairs_seen": metric(float(counts.keys.size), "pairs"),
        "pairs_bytes": metric(float(counts.nbytes), "bytes", at_most=float(COLUMNS * counts.keys.size)),
    }


def _speedup(
    rows: Sequence[Row], source: TokenStrings, pivot: TokenStrings, *, length: int, repeats: int
) -> dict[str, Metric]:
    texts = [([source.decoded[n] for n in mine], [pivot.decoded[n] for n in theirs]) for mine, theirs in rows]
    markers = {"marker_source": source.marker, "marker_pivot": pivot.marker}
    for row, text in zip(rows, texts, strict=True):
        if match_tokens(*row, source, pivot).lists() != published(*text, **markers):
            raise RuntimeError("the two programmes do not match the same tokens: their times cannot be compared")
    progress(f"fusechat: equal matches at {length}")
    ours, theirs, lists = (
        median(times.processor)
        for times in timed(
            lambda: [match_tokens(*row, source, pivot) for row in rows],
            lambda: [published(*text, **markers) for text in texts],
            lambda: [in_lists(*text, **markers) for text in texts],
            repeats=repeats,
        )
    )
    tokens = sum(theirs.size for _, theirs in rows)
    return {
        f"fusechat_speedup_{length}": metric(theirs / ours, "ratio", at_least=GOAL),
        f"fusechat_speedup_{length}_lists": metric(lists / ours, "ratio"),
        f"fusechat_positions_per_second_{length}": metric(tokens / ours, "positions/s"),
    }


def _rows(texts: Sequence[str], source: TextModel, pivot: TextModel, *, length: int, count: int) -> list[Row]:
    chosen = texts_of_length(texts, pivot, positions=length, rows=count)
    return [(np.asarray(source.encode(text)), np.asarray(pivot.encode(text))) for text in chosen]


if __name__ == "__main__":
    main()
