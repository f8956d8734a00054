"""The benchmark of the corpus cannot rot: its files are made, read and accounted for. Nothing is timed here."""

import importlib
from pathlib import Path

import pytest


def test_every_row_of_the_benchmark_is_accounted_for(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[3] / "jobs" / "benchmarks"))
        benchmark = importlib.import_module("corpus")
        benchmark.write(tmp_path / "files", 2000)
        benchmark.one_corpus(tmp_path / "files", tmp_path / "out")
        benchmark._check(tmp_path / "out", 2000)
        with pytest.raises(RuntimeError, match="3000 rows were made, and ingested"):
            benchmark._check(tmp_path / "out", 3000)
