"""What the teach stage tells while it works, and the environment of its actors."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fusion_ray.config import ModelConfig, TeachConfig, TeachResources
from fusion_ray.progress import describe
from fusion_ray.stages.teach import COUNTS, Watch, _Tally, teach
from fusion_ray.stages.vllm_environment import vllm_environment, vllm_version
from fusion_ray.store import Json, Store, Unit


def unit(number: int, *, quarantined: int = 0) -> Unit:
    info: dict[str, object] = {"rows": 10, "tokens": 1000, "rejected": 0, "quarantined": quarantined, "unreached": 0}
    return Unit(f"shard-{number}", 10, 100, "0" * 64, info)  # type: ignore[arg-type]


def test_rates_and_eta_are_of_this_run_alone() -> None:
    watch = Watch(total=8, done=[unit(0), unit(1)])
    first = watch.add(unit(2), "a", 100.0)
    assert (first["done"], first["total"], first["queued"], first["rows"], first["tokens"]) == (3, 8, 5, 30, 3000)
    assert "tokens_per_second" not in first  # engines started until now
    watch.add(unit(3), "b", 102.0)
    third = watch.add(unit(4, quarantined=2), "a", 104.0)
    assert third["tokens_per_second"] == 2000 / 4
    assert third["rows_per_second"] == 20 / 4
    assert third["tokens_per_second_of_an_actor"] == 250
    assert third["eta_seconds"] == 3 * 2
    assert (third["actors"], third["quarantined"], third["errors"], third["queued"]) == (2, 2, 2, 3)
    assert describe(third) == ("5/8 shards, 500 tok/s, 5 rows/s, 2 rows missing, 2 actors of 250 tok/s, ETA 0:00:06")


def test_figures_follow_a_pool_whose_actors_are_replaced() -> None:
    """One actor at a time, each replaced after ten shards; later the shards take ten times as long."""
    watch, now = Watch(total=200, done=[]), 0.0
    for number in range(150):
        now += 5 if number < 100 else 50
        last = watch.add(unit(number), f"actor-{number // 10}", now)
        assert int(str(last["actors"])) <= 8
    assert (last["tokens_per_second"], last["eta_seconds"]) == (1000 / 50, 50 * 50)
    assert int(str(last["actors"])) <= 2


def test_rows_that_are_not_reached_are_missing(tmp_path: Path) -> None:
    tally = _Tally(ModelConfig(name="m", path="m"), 100, 0.05)
    info = dict.fromkeys(COUNTS, 0) | {"unreached": 5, "missing": []}
    tally.add(Unit("shard-0", 10, 1, "", info))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="10 of 100 rows cannot be taught by the model m"):
        tally.add(Unit("shard-1", 10, 1, "", info))  # type: ignore[arg-type]


def test_the_figures_are_ray_metrics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, tuple[float, dict[str, str]]] = {}

    class Recorded:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            seen[self.name] = (value, tags)

    store = Store(str(tmp_path))
    corpus, out = store.artifact("corpus", 1, {}, {}), store.artifact("teach", 1, {}, {})
    corpus.seal([corpus.commit_bytes(f"shard-{number}", b"x", rows=10) for number in range(2)], {})
    info: dict[str, Json] = dict.fromkeys(COUNTS, 0) | {"rows": 10, "tokens": 500, "positions": 90, "bytes": 300}

    def pool(*_: object) -> Iterator[tuple[str, str]]:
        for number in range(2):
            out.commit_bytes(f"shard-{number}", b"y", rows=10, info=info | {"bits": 9.0, "missing": []})
            yield f"shard-{number}", "actor"

    monkeypatch.setattr("fusion_ray.stages.gauges.Gauge", Recorded)
    monkeypatch.setattr("fusion_ray.stages.teach._pool", pool)
    teach(
        out,
        corpus,
        model=ModelConfig(name="m", path="m"),
        template=None,
        config=TeachConfig(),
        max_rejected=0.0,
        seed=0,
        resources=TeachResources(),
        report=lambda figures: None,
    )
    names = ("done", "queued", "rows", "quarantined", "errors", "rows_per_second", "tokens_per_second", "eta_seconds")
    assert {f"fusion_ray_teach_{name}" for name in names} <= set(seen)
    assert seen["fusion_ray_teach_rows"] == (20.0, {"artifact": out.key[:12]})
    assert seen["fusion_ray_teach_queued"][0] == 0


def test_the_last_shard_has_no_eta() -> None:
    watch = Watch(total=2, done=[])
    watch.add(unit(0), "a", 0.0)
    last = watch.add(unit(1), "a", 1.0)
    assert last["eta_seconds"] == 0
    assert describe(last) == "2/2 shards, 1,000 tok/s, 10 rows/s"


def test_engines_on_a_cpu_share_its_cores_and_live_in_their_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = vllm_environment(TeachResources(cpus=2.5))
    assert (found["OMP_NUM_THREADS"], found["VLLM_CPU_OMP_THREADS_BIND"], found["HF_HUB_OFFLINE"]) == (
        "2",
        "nobind",
        "1",
    )
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    gpu = vllm_environment(TeachResources(gpus=1), in_process=False)
    assert not {"OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING"} & set(gpu)
    assert vllm_environment(TeachResources(gpus=1))["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_the_version_is_told_without_importing_vllm() -> None:
    assert vllm_version().startswith("vllm 0.")
