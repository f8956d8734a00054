"""`fusion-ray export` and `fusion-ray import`: rows of artefacts in DistillKit's layout (logprobs/distillkit.py) or as lines of JSON. Called by cli.py.

Beside DistillKit's files an export keeps what they have no place for in `_fusion_ray/` (loaders of data sets pass over such names): the shard without its
top-k. An import takes it from there, or finds it by rendering the corpus again. It knows of each row where it lies and holds those of one shard of the corpus.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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

if TYPE_CHECKING:
    from fusion_ray.corpus.spans import Located  # imports transformers, which is needed where spans are made anew

Form = Literal["distillkit", "jsonl"]
CONFIGURATION = "compression_config.yaml"
FACTS = "_fusion_ray"
OF = "artefact.json"  # within FACTS: which artefact was exported
TOP_K = ("topk_ids", "topk_logprobs")
BATCH_ROWS = 32  # of a Parquet file, decoded at a time
BUFFER_BYTES = 1 << 20

Place = tuple[int, int]  # of a row: the number of its file and its own in there


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
    """Looks once where each row lies, then reads those of a shard of the corpus at a time."""

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
        self.whole = (folder / FACTS).is_dir()
        self.bounded = 0
        self._files = sorted(folder.glob("*.parquet"))
        self._opened: tuple[int, _File, _File] | None = None

    def run(self, corpus: Node, node: Node) -> str:
        if self.whole:
            self._check_origin(node)
        if not self._files:
            raise ConfigError(f"there is no Parquet file in {self.folder}")
        rows_of = self._by_id() if self.whole else self._by_tokens()
        rejected: list[str] = []
        counts: list[tuple[str, int]] = []
        total = positions = tokens = size = 0
        bits = 0.0
        with tempfile.TemporaryDirectory() as scratch:
            for shard in corpus.artifact.manifest().units:
                if shard.name == REJECTED:
                    continue
                conversations = decode_conversations(corpus.artifact.read_bytes(shard.name))
                found = rows_of(conversations)
                rejected += [each.id for each in conversations if each.id not in found]
                rows = [found[each.id] for each in conversations if each.id in found]
                Path(scratch, shard.name).write_bytes(encode(to_table(rows, top_k=self.top_k)))
                counts.append((shard.name, len(rows)))
                total += len(rows)
                positions += sum(len(row.position) for row in rows)
                tokens += sum(len(row.ids) for row in rows)
                size += sum(int((row.byte_end - row.byte_start).sum()) for row in rows)
                bits += sum(map(_nats, rows)) / np.log(2)
            if not total or len(rejected) > self.max_rejected * (total + len(rejected)):
                raise ValueError(
                    f"{len(rejected)} of {total + len(rejected)} conversations of the corpus have no row in {self.folder}, more than corpus.max_rejected = "
                    f"{self.max_rejected} allows; the first is {rejected[0]!r}. Give the files that were made from this corpus with the model "
                    f"{self.model.name} and its chat template"
                )
            # Not before it is known that enough is there: a teach stage would take the shards of an import that failed for its own.
            units = [node.artifact.commit_file(name, Path(scratch, name), rows=count) for name, count in counts]
        units.append(node.artifact.commit_bytes(REJECTED, encode_rejected([])))
        info = {
            "rows": total,
            "positions": positions,
            "tokens": tokens,
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

    def _open(self, number: int) -> "tuple[_File, _File]":
        """A file and, of an export, its facts (else the file again); one of them is open at a time."""
        if self._opened is None or self._opened[0] != number:
            path = self._files[number]
            file = _File(path)
            self._opened = number, file, _File(self.folder / FACTS / path.name) if self.whole else file
        return self._opened[1:]

    def _check_file(self, file: "_File") -> None:
        """Raises ValueError naming a file that is not of the layout or whose compression is not read."""
        with _naming(file.path):
            next(read_table(file.schema.empty_table(), self.compression), None)

    def _entry(self, file: "_File", number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        table = file.row(number)
        try:
            (entry,) = read_table(table, self.compression)
        except ValueError as error:  # which counts within a table of one row
            raise ValueError(f"{file.path}: {str(error).replace('row 0 ', f'row {number} ', 1)}") from error
        return entry

    def _by_id(self) -> Callable[[Sequence[Conversation]], dict[str, TeacherRow]]:
        """What finds the rows of an export, by their ids."""
        places: dict[str, Place] = {}
        for number in range(len(self._files)):
            file, facts = self._open(number)
            self._check_file(file)
            if file.rows != facts.rows:
                raise ValueError(f"{file.path} has {file.rows} rows, its facts in {FACTS} {facts.rows}: export again")
            places |= {str(name): (number, at) for at, name in enumerate(facts.values("id"))}

        def rows_of(conversations: Sequence[Conversation]) -> dict[str, TeacherRow]:
            wanted = sorted((places[each.id], each.id) for each in conversations if each.id in places)
            return {name: self._restored(place) for place, name in wanted}

        return rows_of

    def _restored(self, place: Place) -> TeacherRow:
        """A row of an export."""
        file, rest = self._open(place[0])
        entry, facts = self._entry(file, place[1]), rest.row(place[1])
        position = facts["position"][0].as_py()
        schema = teacher_schema(self.top_k)
        for column, n, kind in (("topk_ids", 1, np.int32), ("topk_logprobs", 2, np.float16)):
            values = [entry[n][position].astype(kind).reshape(-1)]
            facts = facts.append_column(column, pa.array(values, schema.field(column).type))
        (row,) = from_table(facts.select(schema.names).cast(schema))
        return row

    def _by_tokens(self) -> Callable[[Sequence[Conversation]], dict[str, TeacherRow]]:
        """What finds the rows of DistillKit's own files by the tokens of the conversation; a row may be cut or have one token more."""
        places: dict[bytes, Place] = {}
        for number in range(len(self._files)):
            file, _ = self._open(number)
            self._check_file(file)
            for at, tokens in enumerate(file.values("input_ids")):
                ids = np.asarray(tokens, np.int64).astype(np.int32)
                places[_digest(ids)] = (number, at)
                places.setdefault(_digest(ids[:-1]), (number, at))
        locator = self._locator()

        def rows_of(conversations: Sequence[Conversation]) -> dict[str, TeacherRow]:
            wanted = []
            for each in conversations:
                located = locator(each)
                place = None if located is None else places.get(_digest(located.ids))
                if located is not None and place is not None and len(located.position):
                    wanted.append((place, each.id, located))
            wanted.sort(key=lambda one: one[:2])
            return {name: self._labelled(place, name, located) for place, name, located in wanted}

        return rows_of

    def _locator(self) -> "Callable[[Conversation], Located | None]":
        """What renders a conversation as the model reads it; it gives None for one whose text is not found in that."""
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

        def located(conversation: Conversation) -> "Located | None":
            try:
                return locator.locate(conversation.messages).cut_after_turn(self.max_length)
            except UnlocatedError:
                return None

        return located

    def _labelled(self, place: Place, name: str, located: "Located") -> TeacherRow:
        """A row of DistillKit's own files with what the rendering says of its positions."""
        entry = self._entry(self._open(place[0])[0], place[1])
        ids, logprobs = (values[located.position] for values in entry[1:])
        labels, bounded = label_logprobs(ids, logprobs, located.labels)
        self.bounded += bounded
        return TeacherRow(
            name,
            located.ids,
            located.position,
            located.byte_start,
            located.byte_end,
            located.message,
            ids,
            logprobs.astype(np.float16),
            labels,
        )


class _File:
    """A Parquet file, of which a batch of rows is held at a time: to ask for rows in rising order is to read it once. Errors name it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _naming(path):
            self._file = pq.ParquetFile(path, buffer_size=BUFFER_BYTES)
        metadata = self._file.metadata
        groups = (metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
        self._starts = np.cumsum([0, *groups])  # of the row groups
        self.rows: int = metadata.num_rows
        self.schema: pa.Schema = self._file.schema_arrow
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch = None
        self._group, self._first = -1, 0

    def values(self, name: str) -> Iterator[object]:
        """Of one column, every row."""
        with _naming(self.path):
            for batch in self._file.iter_batches(BATCH_ROWS, columns=[name]):
                yield from batch[name].to_pylist()

    def row(self, number: int) -> pa.Table:
        """A copy of the row; the batch that it is in is not kept alive by it."""
        group = int(np.searchsorted(self._starts, number, "right")) - 1
        with _naming(self.path):
            if group != self._group or number < self._first:
                self._batches = self._file.iter_batches(BATCH_ROWS, row_groups=[group])
                self._group, self._first, self._batch = group, int(self._starts[group]), next(self._batches)
            while number >= self._first + self._batch.num_rows:
                self._first += self._batch.num_rows
                self._batch = next(self._batches)
            return pa.Table.from_batches([self._batch.take(pa.array([number - self._first]))])


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """What cannot be read is told with its file."""
    try:
        yield
    except (ValueError, OSError, pa.ArrowException) as error:
        raise ValueError(f"{file}: {str(error).splitlines()[0]}") from error


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def _nats(row: TeacherRow) -> float:
    """The label's cross-entropy over the positions that tell bytes."""
    return float(-row.label_logprob[row.byte_end > row.byte_start].astype(np.float64).sum())


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
