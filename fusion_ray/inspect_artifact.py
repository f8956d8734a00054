"""`fusion-ray inspect ARTEFACT`: what an artefact holds and one of its rows, for the eye or as JSON. Called by cli.py. Imports no torch.

A row of a teacher or an alignment shows, at each predicting position, the label with its probability, the likeliest tokens and the tail mass (what
the K entries leave of 1). Tokens are shown as text where the model's tokenizer is on this machine, else as ids, and it is said why.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fusion_ray.config import ConfigError
from fusion_ray.find_artifact import WITH_ROWS, Found, find_artifact, find_row, model_of
from fusion_ray.logprobs.tail import tail_mass
from fusion_ray.records import MatchKind, top_k_of
from fusion_ray.tokens import Words, read_words

POSITIONS = 24
SHOWN = 5  # of the top-k on a line of the table; the JSON has all
UNITS_SHOWN = 12


@dataclass(frozen=True)
class Entry:
    """One predicting position, with tokens as text (or ids). Probabilities in 0..1; None where the artefact does not say."""

    position: int
    label: str
    label_id: int
    label_probability: float | None
    top: list[tuple[str, int, float]]  # text, id, probability
    tail_mass: float | None
    bytes: tuple[int, int, int] | None = None  # message, start, end within its content
    kind: str | None = None
    side: str | None = None  # which side's distribution an alignment chose


@dataclass(frozen=True)
class View:
    """What is shown: facts of the artefact and, where it has rows, one of them. `why` says why tokens are ids."""

    facts: dict[str, object]
    row: dict[str, object] | None = None
    tokens: tuple[tuple[str, bool], ...] = ()  # each token of the row, and whether a position predicts it
    entries: tuple[Entry, ...] = ()
    why: str = ""


def look(path: str, *, row: str | None, positions: int, model: str | None) -> View:
    """The view of the artefact at `path`. Raises ConfigError for a path, row or model that is not there, StoreError for damaged files."""
    found = find_artifact(path)
    facts = _facts(found)
    stage = found.artifact.stage
    if stage not in WITH_ROWS or (row is None and not found.shards):
        if row is not None:
            raise ConfigError(
                f"--row {row}: an artefact of the stage {stage} has no rows; those of {', '.join(WITH_ROWS)} have"
            )
        return View(facts)
    table = find_row(found, row)
    if stage == "corpus":
        return View(facts, {name: table[name][0].as_py() for name in ("id", "dataset", "messages")})
    words, why = _words(found, model)
    record = {name: _value(table, name) for name in table.column_names}
    ids = np.asarray(record["ids"])
    predicted = np.zeros(len(ids), bool)
    predicted[np.asarray(record["position"], np.int64) + 1] = True
    tokens = tuple((words.text(int(token)), bool(marked)) for token, marked in zip(ids, predicted, strict=True))
    entries = tuple(_entries(record, top_k_of(table.schema), words, positions))
    return View(facts, _row_facts(record), tokens, entries, why)


def show(view: View, console: Console) -> None:
    """Tables for a terminal; elsewhere the same as plain text."""
    console.print(_facts_table(view.facts))
    if view.row is None:
        return
    if "messages" in view.row:
        console.print(Text(f"row {view.row['id']} of {view.row['dataset']}"))
        for message in view.row["messages"]:  # type: ignore[attr-defined]
            console.print(Text.assemble((f"{message['role']}: ", "bold"), message["content"]), soft_wrap=True)
        return
    console.print(Text(", ".join(f"{name} {_short(value)}" for name, value in view.row.items())), soft_wrap=True)
    if view.why:
        console.print(Text(f"tokens are shown as ids: {view.why}", "yellow"), soft_wrap=True)
    separator = " " if view.why else ""
    text = Text("predicted tokens in [ ]: ", "dim")
    for token, predicted in view.tokens:
        text.append(f"[{token}]" if predicted else token, "bold green" if predicted else "dim")
        text.append(separator)
    console.print(text, soft_wrap=True)
    console.print(_entries_table(view.entries))
    total = view.row["positions"]
    if len(view.entries) < total:  # type: ignore[operator]
        console.print(f"{len(view.entries)} of {total} positions; --positions shows more", highlight=False)


def as_json(view: View) -> str:
    """One JSON object: artefact, row, tokens, positions."""
    positions = [
        entry.__dict__ | {"top": [{"token": text, "id": number, "probability": p} for text, number, p in entry.top]}
        for entry in view.entries
    ]
    tokens = [{"token": text, "predicted": predicted} for text, predicted in view.tokens]
    content = {
        "artefact": view.facts,
        "row": view.row,
        "tokens": tokens,
        "positions": positions,
        "ids_because": view.why,
    }
    return json.dumps(content, ensure_ascii=False)


def _facts(found: Found) -> dict[str, object]:
    artifact = found.artifact
    return {
        "artefact": artifact.url,
        "stage": artifact.stage,
        "key": artifact.key,
        "state": "finished"
        if found.sealed
        else "unfinished: settings, inputs and counts are written with its last unit",
        "settings": artifact.config,
        "inputs": artifact.inputs,
        "counts": {name: value for name, value in found.info.items() if not isinstance(value, list)},
        "units": [{"name": unit.name, "rows": unit.rows, "bytes": unit.bytes} for unit in found.units],
    }


def _words(found: Found, model: str | None) -> tuple[Words, str]:
    """Tokens as text, and why not where they are ids. Raises ConfigError for a given model that does not fit."""
    try:
        return read_words(model_of(found, model)), ""
    except (ValueError, OSError) as error:
        if model is not None:
            raise
        return Words(), str(error)


def _value(table: pa.Table, name: str) -> object:
    """A scalar, or a list as an array."""
    scalar = table[name][0]
    return scalar.values.to_numpy(zero_copy_only=False) if pa.types.is_list(scalar.type) else scalar.as_py()


def _row_facts(record: Mapping[str, object]) -> dict[str, object]:
    scalars = {name: value for name, value in record.items() if not isinstance(value, np.ndarray)}
    return scalars | {"tokens": len(record["ids"]), "positions": len(record["position"])}  # type: ignore[arg-type]


def _entries(record: Mapping[str, object], top_k: int, words: Words, limit: int) -> Iterator[Entry]:
    columns = {name: value for name, value in record.items() if isinstance(value, np.ndarray)}
    topk_ids = columns["topk_ids"].reshape(-1, top_k)
    logprobs = columns["topk_logprobs"].reshape(-1, top_k).astype(np.float32)
    tails = tail_mass(logprobs)
    has_target = columns.get("has_target", np.ones(len(tails), bool))
    for n, position in enumerate(columns["position"][:limit].tolist()):
        label = int(columns["ids"][position + 1])
        known = np.isfinite(logprobs[n]) & has_target[n]
        top = [
            (words.text(int(token)), int(token), float(np.exp(value)))
            for token, value in zip(topk_ids[n][known], logprobs[n][known], strict=True)
        ]
        entry = Entry(position, words.text(label), label, _label_probability(columns, n, label, top), top, None)
        changes: dict[str, object] = {"tail_mass": float(tails[n]) if has_target[n] else None}
        if "byte_start" in columns:
            changes["bytes"] = tuple(int(columns[name][n]) for name in ("message", "byte_start", "byte_end"))
        if "kind" in columns:
            changes["kind"] = MatchKind(int(columns["kind"][n])).name.lower()
            changes["side"] = ("source" if columns["from_source"][n] else "pivot") if has_target[n] else "label"
        yield Entry(**(entry.__dict__ | changes))


def _label_probability(
    columns: Mapping[str, np.ndarray], n: int, label: int, top: Sequence[tuple[str, int, float]]
) -> float | None:
    """What the row says of its label; an alignment says it only where the label is among the top-k."""
    if "label_logprob" in columns:
        return float(np.exp(columns["label_logprob"][n]))
    return next((probability for _, token, probability in top if token == label), None)


def _facts_table(facts: Mapping[str, object]) -> RenderableType:
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if name == "units":
            units: Sequence[Mapping[str, object]] = value  # type: ignore[assignment]
            lines = [f"{unit['name']}  {unit['rows']:,} rows, {unit['bytes']:,} bytes" for unit in units[:UNITS_SHOWN]]
            lines += [f"and {len(units) - UNITS_SHOWN} more"] if len(units) > UNITS_SHOWN else []
            table.add_row(f"units ({len(units)})", escape("\n".join(lines)))
        elif isinstance(value, Mapping):
            table.add_row(name, escape("\n".join(f"{key}: {_short(item)}" for key, item in value.items()) or "-"))
        else:
            table.add_row(name, escape(str(value)))
    return table


def _entries_table(entries: Sequence[Entry]) -> RenderableType:
    aligned = any(entry.side for entry in entries)
    spans = any(entry.bytes for entry in entries)
    table = Table()
    for heading, wanted in (
        ("position", True),
        ("message:bytes", spans),
        ("side", aligned),
        ("match", aligned),
        ("label", True),
    ):
        if wanted:
            table.add_column(heading, justify="right" if heading == "position" else "left")
    for heading in ("p(label)", f"likeliest {SHOWN}", "tail"):
        table.add_column(heading, justify="left" if heading.startswith("likeliest") else "right", overflow="fold")
    for entry in entries:
        cells = [str(entry.position)]
        if spans:
            cells.append("{}:{}-{}".format(*entry.bytes) if entry.bytes else "")
        if aligned:
            cells += [entry.side or "", entry.kind or ""]
        likeliest = "  ".join(f"{text} {probability:.3f}" for text, _, probability in entry.top[:SHOWN])
        cells += [entry.label, _number(entry.label_probability), likeliest or "-", _number(entry.tail_mass)]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)
