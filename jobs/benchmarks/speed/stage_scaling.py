"""The align stage with one worker and with two, on the same teach artefacts. Called by `align.py`.

Two small zoo vocabularies, real text, one shard's bytes committed under many names: a minute of work costs a second to make.
Workers are started and warmed before anything is timed, and each has one core: Ray gives a task of one CPU one thread, and shards are read by one.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial

from transformers import AutoTokenizer

from fusion_ray.config import AlignConfig, ModelConfig, ResourcesConfig, WorkerResources
from fusion_ray.logprobs.codec import encode
from fusion_ray.records import ALIGN_FORMAT, TEACH_FORMAT
from fusion_ray.stages.align import align
from fusion_ray.stages.cluster import connected
from fusion_ray.store import Artifact, Store
from fusion_ray.workers.align_setup import load_vocabulary
from fusion_ray.zoo.catalogue import MODELS
from speed.line import median, progress, timed
from speed.teacher_tables import TextModel, teacher_table, texts_of_length

POSITIONS, ROWS = 512, 256  # of a shard: corpus.rows_per_shard's default
WORKERS = (1, 2)


def stage_seconds(texts: Sequence[str], *, shards: int, repeats: int) -> list[list[float]]:
    """The stage's wall-clock seconds with each of WORKERS, `repeats` times in turn."""
    pivot, source = (ModelConfig(name=name, path=str(MODELS / name)) for name in ("pivot", "source_mistral"))
    # Ray's workers are nice to everything else on the machine (15), so what else runs there would decide; at 0 they get their share.
    os.environ.setdefault("RAY_worker_niceness", "0")
    with tempfile.TemporaryDirectory() as folder, connected(ResourcesConfig(num_cpus=4, object_store_gb=0.2)):
        store = Store(folder)
        chosen = texts_of_length(texts, _text_model(pivot), positions=POSITIONS, rows=ROWS)
        taught = {
            count: [_taught(store, model, chosen, count, seed) for seed, model in enumerate((pivot, source))]
            for count in (len(WORKERS) * 2, shards)
        }

        def run(workers: int, count: int) -> None:
            started = time.perf_counter()
            out = store.artifact("align", ALIGN_FORMAT, {"workers": workers}, {})
            align(
                out,
                *taught[count],
                pivot=pivot,
                source=source,
                config=AlignConfig(),
                resources=WorkerResources(max_workers=workers),
                report=lambda figures: None,
            )
            out.remove()
            progress(f"align stage: {count} shards by {workers} worker(s) in {time.perf_counter() - started:.1f} s")

        run(max(WORKERS), len(WORKERS) * 2)
        return [times.wall for times in timed(*(partial(run, workers, shards) for workers in WORKERS), repeats=repeats)]


def speed_up(times: Sequence[Sequence[float]]) -> float:
    """The median over the repeats of the time with one worker over the time with two, taken in turn."""
    one, two = times
    return median([first / second for first, second in zip(one, two, strict=True)])


def _text_model(model: ModelConfig) -> TextModel:
    tokenizer = AutoTokenizer.from_pretrained(model.path, model_max_length=1 << 30)  # whole texts, without its warning
    return TextModel(load_vocabulary(model), lambda text: list(tokenizer.encode(text, add_special_tokens=False)))


def _taught(store: Store, model: ModelConfig, texts: Sequence[str], shards: int, seed: int) -> Artifact:
    """A sealed teach artefact whose shards all hold the same rows."""
    out = store.artifact("teach", TEACH_FORMAT, {"model": model.name, "shards": shards}, {})
    data = encode(teacher_table(_text_model(model), texts, seed=seed))
    names = [f"shard-{number:05d}.parquet" for number in range(shards)]
    out.seal([out.commit_bytes(name, data, rows=len(texts)) for name in names])
    return out
