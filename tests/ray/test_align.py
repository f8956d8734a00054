"""The align stage on a local Ray cluster: shards over tasks, resume, the same bytes, errors that a user can mend."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import ray

from fusion_ray.alignment.counts import PairCounts
from fusion_ray.config import AlignConfig, ConfigError, ModelConfig, WorkerResources
from fusion_ray.corpus.shards import decode_rejected
from fusion_ray.logprobs.codec import encode, to_table
from fusion_ray.records import ALIGN_FORMAT
from fusion_ray.stages import align as align_module
from fusion_ray.stages.align import align
from fusion_ray.stages.align_combine import combine_all
from fusion_ray.store import Artifact, Store, Unit
from fusion_ray.workers.align_counts import decode_counts, encode_counts, read_counts
from fusion_ray.workers.aligner import Aligner, explained_row
from tests.teaching import made_up_rows
from tests.tiny import make_tiny_model, make_tokenizer

pytestmark = pytest.mark.ray

CONTENTS = [
    "The answer is 42.",
    "A fox, a dog and a horse.",
    "Yes",
    "Water boils at one hundred degrees.\n",
    "Paris",
    "naß 👩‍🚀 schön",
]
SHARDS = 3
K = 4


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init("local", num_cpus=2, object_store_memory=200_000_000, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, ModelConfig]:
    root = tmp_path_factory.mktemp("models")
    make_tiny_model(root / "pivot", "llama", "bytelevel", "chatml")
    make_tiny_model(root / "source", "gemma", "sentencepiece", "inst")
    return ModelConfig(name="pivot", path=str(root / "pivot")), ModelConfig(name="other", path=str(root / "source"))


def taught(store: Store, name: str, kind: str, template: str, contents: list[str], probability: float) -> Artifact:
    """A sealed teach artefact of SHARDS shards."""
    out = store.artifact("teach", 1, {"model": name, "contents": contents}, {})
    rows = made_up_rows(make_tokenizer(kind, template=template), contents, top_k=K, label_probability=probability)
    size = -(-len(rows) // SHARDS)
    units = []
    for number in range(SHARDS):
        part = rows[number * size : (number + 1) * size]
        units.append(out.commit_bytes(f"shard-{number:05d}.parquet", encode(to_table(part, top_k=K)), rows=len(part)))
    out.seal(units)
    return out


def sides(store: Store, contents: list[str] = CONTENTS) -> tuple[Artifact, Artifact]:
    return (
        taught(store, "pivot", "bytelevel", "chatml", CONTENTS, 0.2),
        taught(store, "other", "sentencepiece", "inst", contents, 0.8),
    )


def run(
    out: Artifact, rows: tuple[Artifact, Artifact], models: tuple[ModelConfig, ModelConfig], **options: object
) -> list[Mapping[str, object]]:
    """Runs the stage and gives back what it reported."""
    reports: list[Mapping[str, object]] = []
    settings = {"config": AlignConfig(), "resources": WorkerResources(max_workers=2), "max_rejected": 0.01} | options
    align(out, *rows, pivot=models[0], source=models[1], report=reports.append, **settings)  # type: ignore[arg-type]
    return reports


def target(store: Store, label: str = "") -> Artifact:
    return store.artifact("align", ALIGN_FORMAT, {"label": label}, {})


def test_shards_are_aligned_side_by_side_and_the_manifest_tells_the_coverage(
    tmp_path: Path, models: tuple[ModelConfig, ModelConfig]
) -> None:
    store = Store(str(tmp_path))
    rows, out = sides(store), target(store)
    reports = run(out, rows, models)
    assert [report["done"] for report in reports] == [1, 2, 3]
    manifest = out.manifest()
    out.verify()
    assert [unit.name for unit in manifest.units] == [
        "examples.json",
        "rejected.parquet",
        "shard-00000.parquet",
        "shard-00001.parquet",
        "shard-00002.parquet",
    ]
    info = manifest.info
    assert (info["rows"], info["rejected"], info["source_won"]) == (len(CONTENTS), 0, 1.0)
    coverage = info["coverage"]
    assert isinstance(coverage, dict)
    assert sum(coverage.values()) == pytest.approx(1.0)  # type: ignore[arg-type]
    assert coverage["strict"] > 0.5  # type: ignore[operator]
    assert {"mass_kept", "one_hot", "top1_agreement", "worst_pairs", "positions"} <= info.keys()
    examples = json.loads(out.read_bytes("examples.json"))
    assert [row["id"] for row in examples] == [f"row-{number}" for number in range(len(CONTENTS))]
    place = {"text", "message", "byte_start", "byte_end"}
    assert examples[0]["pivot"][0].keys() == place | {"kind", "source_index", "becomes", "from_source"}
    assert examples[0]["source"][0].keys() == place | {"says"}
    shown = explained_row(*rows, pivot=models[0], source=models[1], config=AlignConfig(), row="row-5")
    assert shown == examples[5]
    with pytest.raises(ConfigError, match="no row 'row-99'"):
        explained_row(*rows, pivot=models[0], source=models[1], config=AlignConfig(), row="row-99")


def test_a_run_that_was_cut_off_makes_only_what_is_missing_and_the_same_bytes(
    tmp_path: Path, models: tuple[ModelConfig, ModelConfig]
) -> None:
    store = Store(str(tmp_path))
    rows, whole, cut = sides(store), target(store, "whole"), target(store, "cut")
    run(whole, rows, models)
    run(cut, rows, models, resources=WorkerResources(max_workers=1))
    sums = {unit.name: unit.sha256 for unit in whole.manifest().units}
    assert {unit.name: unit.sha256 for unit in cut.manifest().units} == sums
    cut.remove("manifest.json")
    for name in ("shard-00001.parquet", "_units/shard-00001.parquet.json"):
        cut.remove(name)
    assert [report["done"] for report in run(cut, rows, models)] == [3]
    assert {unit.name: unit.sha256 for unit in cut.manifest().units} == sums
    assert run(cut, rows, models) == []  # sealed: nothing is done


def test_rows_that_cannot_be_aligned_are_listed_or_fail_the_stage(
    tmp_path: Path, models: tuple[ModelConfig, ModelConfig]
) -> None:
    store = Store(str(tmp_path))
    rows, out = sides(store, ["The answer is 43!", *CONTENTS[1:]]), target(store)
    with pytest.raises(
        ValueError,
        match=r"1 of 6 rows cannot be aligned with the source other, .*max_rejected.* row row-0: different text",
    ) as error:
        run(out, rows, models)
    assert type(error.value) is ValueError  # not Ray's wrapper with its traceback
    assert not out.sealed
    run(out, rows, models, max_rejected=0.5)
    left_out = decode_rejected(out.read_bytes("rejected.parquet"))
    assert [row.id for row in left_out] == ["row-0"]
    assert (out.manifest().info["rows"], out.manifest().info["rejected"]) == (5, 1)


def test_counted_maps_are_made_of_all_shards_and_a_cut_run_counts_none_twice(
    tmp_path: Path, models: tuple[ModelConfig, ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    rows, out = sides(store), target(store)
    config = AlignConfig(method="fusechat", map="statistics", choose="source")

    # cut off between counting and aligning, with one shard's count lost
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(align_module, "sum_counts", cut)
    with pytest.raises(KeyboardInterrupt):
        run(out, rows, models, config=config)
    names = [f"shard-{number:05d}.parquet" for number in range(SHARDS)]
    assert [name for name in out.names("_counts")] == [f"_counts/{name}" for name in names]
    monkeypatch.undo()
    kept = {name: Path(out.path(f"_counts/{name}")).stat().st_mtime_ns for name in names[1:]}
    out.remove(f"_counts/{names[0]}")
    counted: list[int] = []
    read = align_module.sum_counts

    def watch(*arguments: object) -> Unit:
        counted.extend(Path(out.path(f"_counts/{name}")).stat().st_mtime_ns == kept[name] for name in names[1:])
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(align_module, "sum_counts", watch)
    reports = run(out, rows, models, config=config)
    assert [(report.get("phase"), report["done"]) for report in reports] == [
        ("count", 3),
        (None, 1),
        (None, 2),
        (None, 3),
    ]
    assert counted == [True, True]
    assert out.names("_counts") == []
    out.verify()

    # the pure pass, without Ray
    shards = [tuple(side.read_bytes(name) for side in rows) for name in names]
    counting = Aligner.of_models(*models, config)
    total = PairCounts.none()
    for shard in shards:
        total = total + counting.count(*shard)
    assert total.counts.sum() > 100
    assert out.read_bytes("counts.parquet") == encode_counts(total)
    aligner = Aligner.of_models(*models, config, total)
    for name, shard in zip(names, shards, strict=True):
        assert out.read_bytes(name) == aligner.align(*shard).encoded()
    shown = explained_row(
        *rows, pivot=models[0], source=models[1], config=config, row="row-0", counts=read_counts(out, config)
    )
    assert shown == json.loads(out.read_bytes("examples.json"))[0]


def test_equal_vocabularies_need_no_counts(tmp_path: Path, models: tuple[ModelConfig, ModelConfig]) -> None:
    store = Store(str(tmp_path))
    rows = taught(store, "pivot", "bytelevel", "chatml", CONTENTS, 0.2)
    out = target(store)
    run(out, (rows, rows), (models[0], models[0]), config=AlignConfig(method="fusechat", map="statistics"))
    assert decode_counts(out.read_bytes("counts.parquet")).keys.size == 0
    assert out.manifest().info["top1_agreement"] == 1.0


def test_what_a_user_can_mend_is_said_plainly(tmp_path: Path, models: tuple[ModelConfig, ModelConfig]) -> None:
    store = Store(str(tmp_path))
    pivot_rows, source_rows = sides(store)
    with pytest.raises(ConfigError, match=r"align.map is 'canonical'"):
        run(target(store), (pivot_rows, source_rows), models, config=AlignConfig(method="fusechat"))
    lacking = store.artifact("teach", 1, {"model": "lacking"}, {})
    lacking.seal([lacking.commit_bytes("shard-00000.parquet", source_rows.read_bytes("shard-00000.parquet"), rows=2)])
    with pytest.raises(ValueError, match=r"holds shard-00001.parquet and .* does not"):
        run(target(store), (pivot_rows, lacking), models)
    broken = store.artifact("teach", 1, {"model": "broken"}, {})
    broken.seal([broken.commit_bytes(f"shard-{n:05d}.parquet", b"PAR1 cut off", rows=2) for n in range(SHARDS)])
    with pytest.raises(ValueError, match=r"shard-0000\d.parquet of ") as error:
        run(target(store), (pivot_rows, broken), models)
    assert type(error.value) is ValueError


def test_one_target_of_two_sources_is_made_of_the_better_rows(
    tmp_path: Path, models: tuple[ModelConfig, ModelConfig]
) -> None:
    store = Store(str(tmp_path))
    pivot = taught(store, "pivot", "bytelevel", "chatml", CONTENTS, 0.5)
    aligned = {}
    for name, probability in (("good", 0.8), ("poor", 0.2)):
        source = taught(store, name, "sentencepiece", "inst", CONTENTS, probability)
        aligned[name] = target(store, name)
        run(aligned[name], (pivot, source), models)
    out = target(store, "all")
    options = {"config": AlignConfig(), "resources": WorkerResources(max_workers=2)}
    reports: list[Mapping[str, object]] = []
    manifest = combine_all(out, sources=aligned, report=reports.append, **options)  # type: ignore[arg-type]
    out.verify()
    assert [report["done"] for report in reports] == [1, 2, 3]
    assert manifest.info == {"rows": len(CONTENTS), "won": {"good": len(CONTENTS), "poor": 0}}
    for unit in manifest.units:
        assert out.read_bytes(unit.name) == aligned["good"].read_bytes(unit.name)
    out.remove("manifest.json")
    for name in ("shard-00001.parquet", "_units/shard-00001.parquet.json"):
        out.remove(name)
    reports.clear()
    assert combine_all(out, sources=aligned, report=reports.append, **options) == manifest  # type: ignore[arg-type]
    assert [report["done"] for report in reports] == [3]
