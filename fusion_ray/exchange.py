"""`fusion-ray export` and `fusion-ray import`: rows of artefacts in DistillKit's layout (logprobs/distillkit.py) or as lines of JSON. Called by cli.py.

Beside DistillKit's files an export keeps what they have no place for in `_fusion_ray/` (loaders of data sets pass over such names): the shard without its
top-k. An import takes it from there, or finds it by rendering the corpus again.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from fusion_ray.config import ConfigError, FusionConfig, ModelConfig
from fusion_ray.corpus.shards import REJECTED, decode_conversations, encode_rejected
from fusion_ray.find_artifact import Found, find_artifact, model_of, read_shard
from fusion_ray.graph import Node, build_graph
from fusion_ray.logprobs.codec import TeacherRow, encode, from_table, to_table
from fusion_ray.logprobs.distillkit import Dtype, SparseRow, configuration, read_table
from fusion_ray.logprobs.distillkit import to_table as to_distillkit
from fusion_ray.models import local_folder
from fusion_ray.records import Conversation, teacher_schema, top_k_of
from fusion_ray.store import Unit

Form = Literal["distillkit", "jsonl"]
CONFIGURATION = "compression_config.yaml"
FACTS = "_fusion_ray"
OF = "artefact.json"  # within FACTS: which artefact was exported
TOP_K = ("topk_ids", "topk_logprobs")


def export_rows(path: str, out: Path, *, form: Form, dtype: Dtype, model: str | None) -> str:
    """Write every row of the artefact at `path` to `out` and say what was written. Nothing is left of an export that fails.

    Raises ConfigError for what is no finished artefact with top-k rows, for an `out` that is there, and where the model that says V is not found.
    """
    found = find_artifact(path)
    if found.artifact.stage not in ("teach", "align"):
        raise ConfigError(
            f"{path} is an artefact of the stage {found.artifact.stage}: those of teach and align have logprobs to export"
        )
    if not found.sealed:
        raise ConfigError(f"{path} is not finished: run its stage to the end, then export")
    if out.exists():
        raise ConfigError(
            f"{out} is there already: give the name of a new {'folder' if form == 'distillkit' else 'file'}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        rows = _lines(found, temporary) if form == "jsonl" else _distillkit(found, temporary, dtype, model)
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
        raise
    return f"{rows} rows of {found.artifact.stage} {found.artifact.key} in {out}"


def _lines(found: Found, target: Path) -> int:
    rows = 0
    with open(target, "w", encoding="utf-8") as file:
        for name in found.shards:
            table = read_shard(found, name)
            top_k = top_k_of(table.schema)
            for record in table.to_pylist():
                for column in TOP_K:
                    values = record[column]
                    record[column] = [
                        [_finite(v) for v in values[at : at + top_k]] for at in range(0, len(values), top_k)
                    ]
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            rows += table.num_rows
    return rows


def _finite(value: float) -> float | None:
    """JSON has no infinity: an entry of an alignment that is missing is null."""
    return value if np.isfinite(value) else None


def _distillkit(found: Found, target: Path, dtype: Dtype, model: str | None) -> int:
    vocabulary = _vocabulary(model_of(found, model))
    (target / FACTS).mkdir(parents=True)
    top_k = 0
    for name in found.shards:
        table = read_shard(found, name)
        top_k = top_k_of(table.schema)
        rows = [_sparse(table.slice(number, 1), top_k) for number in range(table.num_rows)]
        exported = to_distillkit(rows, vocabulary=vocabulary, top_k=top_k, dtype=dtype)
        pq.write_table(exported, target / name, compression="zstd")
        pq.write_table(table.drop_columns(list(TOP_K)), target / FACTS / name, compression="zstd")
    described = {"stage": found.artifact.stage, "inputs": found.artifact.inputs}
    (target / FACTS / OF).write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
    (target / CONFIGURATION).write_text(yaml.safe_dump(configuration(vocabulary, top_k, dtype), sort_keys=False))
    return sum(unit.rows for unit in found.units if unit.name in found.shards)


def _sparse(table: pa.Table, top_k: int) -> SparseRow:
    columns = {name: table[name][0].values.to_numpy(zero_copy_only=False) for name in ("ids", "position", *TOP_K)}
    known = table["has_target"][0].values.to_numpy(zero_copy_only=False) if "has_target" in table.column_names else ...
    ids, logprobs = (columns[name].reshape(-1, top_k)[known] for name in TOP_K)
    return SparseRow(str(table["id"][0].as_py()), columns["ids"], columns["position"][known], ids, logprobs)


def _vocabulary(folder: str) -> int:
    """V: the rows of the model's head. Raises ConfigError where the folder does not say."""
    config = json.loads((Path(local_folder(folder)) / "config.json").read_text())
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise ConfigError(f"{folder}/config.json says no vocab_size, which an export needs for the width of an id")
    return size


def import_rows(folder: Path, config: FusionConfig, teacher: str) -> str:
    """Make `teacher`'s teach artefact of `config` from DistillKit's files in `folder`, and say what became of them.

    manifest.info as of a teach stage, `engine` "import", and `labels_bounded`: labels outside the top K, see label_logprobs. Raises ConfigError for
    settings that these files are not of, and ValueError naming the file for rows that are not those of the corpus.
    """
    names = [config.pivot.name, *(source.name for source in config.sources)]
    if teacher not in names:
        raise ConfigError(f"--teacher {teacher!r}: the config has the models {', '.join(names)}")
    compression = _compression(folder)
    if compression.get("k") != config.teach.top_k:
        raise ConfigError(
            f"{folder} holds top {compression.get('k')} logprobs, teach.top_k is {config.teach.top_k}: set teach.top_k={compression.get('k')}"
        )
    graph = build_graph(config)
    node = graph.teach[teacher]
    if node.artifact.sealed:
        return f"{node.artifact.url} is finished already: nothing was imported"
    if not graph.corpus.artifact.sealed:
        raise ConfigError(
            f"the corpus {graph.corpus.artifact.url} is not made yet: run `fusion-ray teach CONFIG --only NAME` of another model once, which makes it"
        )
    model = next(model for model in (config.pivot, *config.sources) if model.name == teacher)
    template = config.pivot if config.corpus.template == "pivot" and teacher != config.pivot.name else None
    return _Importer(folder, compression, config, model, template).run(graph.corpus, node)


class _Importer:
    """Reads the files once, then writes a shard for each of the corpus."""

    def __init__(
        self,
        folder: Path,
        compression: Mapping[str, object],
        config: FusionConfig,
        model: ModelConfig,
        template: ModelConfig | None,
    ) -> None:
        self.folder, self.compression, self.model, self.template = folder, compression, model, template
        self.top_k, self.max_length = config.teach.top_k, config.teach.max_length
        self.max_rejected = config.corpus.max_rejected
        self.bounded = 0

    def run(self, corpus: Node, node: Node) -> str:
        whole = (self.folder / FACTS).is_dir()
        if whole:
            self._check_origin(node)
        found = self._restored() if whole else self._located(corpus)
        units, rejected = [], []
        shards = [unit for unit in corpus.artifact.manifest().units if unit.name != REJECTED]
        kept: list[tuple[Unit, list[TeacherRow]]] = []
        for shard in shards:
            rows = []
            for conversation in decode_conversations(corpus.artifact.read_bytes(shard.name)):
                row = found.get(conversation.id)
                if row is None:
                    rejected.append(conversation.id)
                else:
                    rows.append(row)
            kept.append((shard, rows))
        total = sum(len(rows) for _, rows in kept)
        if not total or len(rejected) > self.max_rejected * (total + len(rejected)):
            raise ValueError(
                f"{len(rejected)} of {total + len(rejected)} conversations of the corpus have no row in {self.folder}, more than corpus.max_rejected = "
                f"{self.max_rejected} allows; the first is {rejected[0]!r}. Give the files that were made from this corpus with the model {self.model.name} "
                "and its chat template"
            )
        positions = sum(len(row.position) for _, rows in kept for row in rows)
        size = sum(int((row.byte_end - row.byte_start).sum()) for _, rows in kept for row in rows)
        bits = 0.0
        for shard, rows in kept:
            bits += sum(
                float(-row.label_logprob[row.byte_end > row.byte_start].astype(np.float64).sum()) for row in rows
            ) / np.log(2)
            units.append(
                node.artifact.commit_bytes(shard.name, encode(to_table(rows, top_k=self.top_k)), rows=len(rows))
            )
        units.append(node.artifact.commit_bytes(REJECTED, encode_rejected([])))
        info = {
            "rows": total,
            "positions": positions,
            "tokens": sum(len(row.ids) for _, rows in kept for row in rows),
            "bytes": size,
            "cut_rows": 0,
            "cut_turns": 0,
            "rejected": 0,
            "quarantined": 0,
            "unreached": len(rejected),
            "bits_per_byte": float(bits / size) if size else 0.0,
            "bytes_per_position": sum(unit.bytes for unit in units) / max(1, positions),
            "engine": "import from DistillKit's layout",
            "labels_bounded": self.bounded,
        }
        node.artifact.seal(units, info)
        return (
            f"{total} rows, {positions} positions in {node.artifact.url}; {len(rejected)} conversations have no row, "
            f"{self.bounded} labels outside the top {self.top_k} have the largest logprob that they can have"
        )

    def _check_origin(self, node: Node) -> None:
        """Raises ConfigError for an export of another artefact than a teacher's of this corpus and model."""
        origin = json.loads((self.folder / FACTS / OF).read_text())
        if origin["stage"] != "teach":
            raise ConfigError(
                f"{self.folder} was exported from an artefact of the stage {origin['stage']}: only an export of a teach artefact is what a teacher said"
            )
        wanted = node.artifact.inputs
        other = sorted(name for name in {*wanted, *origin["inputs"]} if wanted.get(name) != origin["inputs"].get(name))
        if other:
            raise ConfigError(
                f"{self.folder} was exported from another {' and '.join(other)} than this config gives to {self.model.name}. Give that config, "
                f"or remove {self.folder / FACTS} to have the rows matched with this corpus by their tokens"
            )

    def _files(self) -> list[Path]:
        files = sorted(self.folder.glob("*.parquet"))
        if not files:
            raise ConfigError(f"there is no Parquet file in {self.folder}")
        return files

    def _entries(self, file: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        try:
            yield from read_table(pq.read_table(file), self.compression)
        except (ValueError, OSError) as error:
            raise ValueError(f"{file}: {str(error).splitlines()[0]}") from error

    def _restored(self) -> dict[str, TeacherRow]:
        """The rows of an export, by id."""
        rows: dict[str, TeacherRow] = {}
        for file in self._files():
            facts = pq.read_table(self.folder / FACTS / file.name)
            entries = list(self._entries(file))
            if len(entries) != facts.num_rows:
                raise ValueError(f"{file} has {len(entries)} rows, its facts in {FACTS} {facts.num_rows}: export again")
            position = facts["position"].to_pylist()
            for column, n, kind in (("topk_ids", 1, np.int32), ("topk_logprobs", 2, np.float16)):
                values = [entry[n][at].astype(kind).reshape(-1) for entry, at in zip(entries, position, strict=True)]
                facts = facts.append_column(column, pa.array(values, teacher_schema(self.top_k).field(column).type))
            schema = teacher_schema(self.top_k)
            facts = facts.select(schema.names).cast(schema)
            rows |= {row.id: row for row in from_table(facts)}
        return rows

    def _located(self, corpus: Node) -> dict[str, TeacherRow]:
        """The rows of DistillKit's own files by the id of the conversation that renders to their tokens; a row may be cut or have one token more."""
        by_tokens: dict[bytes, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for file in self._files():
            for entry in self._entries(file):
                by_tokens[entry[0][: len(entry[1])].tobytes()] = entry
                by_tokens[entry[0].tobytes()] = entry
        return {row.id: row for row in self._match(corpus, by_tokens)}

    def _match(
        self, corpus: Node, by_tokens: Mapping[bytes, tuple[np.ndarray, np.ndarray, np.ndarray]]
    ) -> Iterator[TeacherRow]:
        from transformers import AutoTokenizer  # slow to import, needed where spans are made anew

        from fusion_ray.corpus.spans import Locator
        from fusion_ray.corpus.template import UnlocatedError

        def tokenizer(model: ModelConfig) -> object:
            return AutoTokenizer.from_pretrained(
                local_folder(model.path, model.revision), trust_remote_code=model.trust_remote_code
            )

        locator = Locator(
            tokenizer(self.model),
            template=None if self.template is None else tokenizer(self.template),
            name=self.model.name,
        )
        for conversation in _conversations(corpus):
            try:
                located = locator.locate(conversation.messages).cut_after_turn(self.max_length)
            except UnlocatedError:
                continue
            entry = by_tokens.get(located.ids.tobytes())
            if entry is None or not len(located.position):
                continue
            ids, logprobs = (values[located.position] for values in entry[1:])
            labels, bounded = label_logprobs(ids, logprobs, located.labels)
            self.bounded += bounded
            yield TeacherRow(
                conversation.id,
                located.ids,
                located.position,
                located.byte_start,
                located.byte_end,
                located.message,
                ids,
                logprobs.astype(np.float16),
                labels,
            )


def label_logprobs(ids: np.ndarray, logprobs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, int]:
    """(N,) float32 logprobs of the labels (N,) from the top-k (N, K), and how many of them are outside it.

    Those have the largest value that they can have: no more than the last of the K, and no more than the mass that the K leave.
    """
    hit = ids == labels[:, None]
    inside = hit.any(axis=1)
    with np.errstate(divide="ignore"):
        rest = np.log(np.clip(1 - np.exp(logprobs.astype(np.float64)).sum(axis=1), 1e-7, 1))
    bound = np.minimum(logprobs.min(axis=1, initial=0), rest)
    own = np.take_along_axis(logprobs, hit.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(inside, own, bound).astype(np.float32), int((~inside).sum())


def _conversations(corpus: Node) -> Iterator[Conversation]:
    for unit in corpus.artifact.manifest().units:
        if unit.name != REJECTED:
            yield from decode_conversations(corpus.artifact.read_bytes(unit.name))


def _compression(folder: Path) -> dict[str, object]:
    path = folder / CONFIGURATION
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no {CONFIGURATION}, which says how its logprobs are compressed: put the one that DistillKit wrote beside the files"
        )
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, expected keys such as d, k and exact_k")
    return content
