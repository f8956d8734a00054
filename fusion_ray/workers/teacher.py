"""One teacher: a chat model reads conversations and gives its top-k logprobs at every position that predicts an assistant byte or the end of a turn.

Works in a plain process. Called by workers/teach_shard.py, which commits what it returns. Source: FuseChat (arXiv 2402.16107) section 3.2, the
representation of each source model, here in the teacher's own vocabulary.
"""

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from fusion_ray.config import EndpointConfig, EngineArgs
from fusion_ray.corpus.readers import Rejected
from fusion_ray.corpus.spans import Located
from fusion_ray.corpus.template import UnlocatedError
from fusion_ray.logprobs.codec import TeacherRow, to_table
from fusion_ray.logprobs.flat import TopK
from fusion_ray.records import Conversation, Message

logger = logging.getLogger(__name__)

# Told the ids of the rows that the engine is about to read.
Starting = Callable[[list[str]], None]


@dataclass
class Counts:
    """What a shard came to. `bits` are of the labels that have bytes; `tokens` are those the engine read.

    `rows` are in the table, of which `cut_rows` were longer than the longest prompt and lost `cut_turns` assistant turns at their ends; `rejected` could not be
    located, `quarantined` killed the engine or had logprobs that are not finite, and `unreached` have no whole assistant turn within the longest prompt.
    """

    rows: int = 0
    positions: int = 0
    tokens: int = 0
    bytes: int = 0
    bits: float = 0.0
    cut_rows: int = 0
    cut_turns: int = 0
    rejected: int = 0
    quarantined: int = 0
    unreached: int = 0

    def add(self, other: "Counts") -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Taught:
    """The teacher rows of some conversations (in their order), the counts, and the rows that are missing with their reason."""

    table: pa.Table
    counts: Counts
    rejected: tuple[Rejected, ...]


class Reads(Protocol):
    """What reads prompts: workers/engine.Engine or workers/endpoint.Endpoint."""

    version: str
    max_prompt: int

    def locate(self, messages: Sequence[Message]) -> Located: ...

    def prompt_logprobs(
        self, prompts: Sequence[Sequence[int]], starting: Callable[[Sequence[int]], None] = ...
    ) -> list[TopK]: ...


class Teacher:
    """A chat model in `model_folder` that teaches, in a vLLM engine or, where one is given, behind `endpoint` with its `api_key`.

    Rows longer than `max_length` or than the model's window end with their last whole turn. `template_folder` renders rows with another model's chat template
    (corpus.template: pivot). Raises ValueError as Engine and Endpoint do.
    """

    def __init__(
        self,
        model_folder: str,
        *,
        top_k: int,
        max_length: int,
        template_folder: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        seed: int = 0,
        engine: EngineArgs | None = None,
        name: str = "",
        endpoint: EndpointConfig | None = None,
        api_key: str | None = None,
    ) -> None:
        self.top_k = top_k
        self._max_length = max_length
        self._engine: Reads
        if endpoint is not None:
            from fusion_ray.workers.endpoint import Endpoint

            self._engine = Endpoint(
                model_folder,
                endpoint=endpoint,
                api_key=api_key,
                max_length=max_length,
                top_k=top_k,
                template_folder=template_folder,
                trust_remote_code=trust_remote_code,
                engine=engine,
                name=name,
            )
        else:
            # Here, as the actor of an endpoint needs no vLLM, whose import takes ten seconds.
            from fusion_ray.workers.engine import Engine

            self._engine = Engine(
                model_folder,
                max_length=max_length,
                top_k=top_k,
                template_folder=template_folder,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                seed=seed,
                engine=engine,
                name=name,
            )
        self.version = self._engine.version

    def teach(
        self,
        conversations: Sequence[Conversation],
        *,
        alone: Collection[str] = (),
        quarantined: Collection[str] = (),
        starting: Starting = lambda ids: None,
    ) -> Taught:
        """Teacher rows of the conversations; the same for the same conversations whatever was taught before.

        `starting` is told the ids that the engine is about to read. Ids in `alone` are read one at a time (they are suspects in an engine's death), those in
        `quarantined` not at all. A row that cannot be located, whose first assistant turn does not fit, or whose logprobs are not finite, is left out with
        its reason.
        """
        counts = Counts()
        rejected: list[Rejected] = []
        located: dict[str, Located] = {}
        for number, conversation in enumerate(conversations, 1):
            if conversation.id in quarantined:
                counts.quarantined += 1
                rejected.append(_missing(conversation, number, "quarantined: the engine died twice on this row alone"))
                continue
            try:
                whole = self._engine.locate(conversation.messages)
            except Exception as error:  # the row's, never the engine's: it has not seen the row
                why = str(error) if isinstance(error, UnlocatedError) else f"{type(error).__name__}: {error}"
                counts.rejected += 1
                rejected.append(_missing(conversation, number, why))
                continue
            kept = whole.cut_after_turn(self._engine.max_prompt)
            if len(kept.position) == 0:
                counts.unreached += 1
                rejected.append(_missing(conversation, number, self._unreached(whole)))
                continue
            counts.cut_rows += kept is not whole
            counts.cut_turns += whole.turns - kept.turns
            located[conversation.id] = kept
        answers = self._read(located, alone, starting)
        rows = []
        for number, conversation in enumerate(conversations, 1):
            if conversation.id not in located:
                continue
            row, top = located[conversation.id], answers[conversation.id]
            counts.tokens += len(row.ids)
            if not top.finite:
                counts.quarantined += 1
                rejected.append(
                    _missing(conversation, number, "quarantined: the engine gave logprobs that are not finite")
                )
                continue
            rows.append(_row(conversation.id, row, top))
            counts.rows += 1
            counts.positions += len(row.position)
            counts.bytes += row.bytes
            counts.bits += label_bits(row, top)
        rejected.sort(key=lambda missing: missing.row)
        return Taught(to_table(rows, top_k=self.top_k), counts, tuple(rejected))

    def _unreached(self, row: Located) -> str:
        """Why nothing is left of a row."""
        if not row.first_turn_end:
            return f"none of its {len(row.ids)} tokens is the assistant's"
        longest = self._engine.max_prompt
        what, cure = "the model's window leaves for a prompt", "shorten the row or take a model with a longer window"
        if longest == self._max_length:
            what, cure = "of teach.max_length", f"shorten the row or raise teach.max_length to {row.first_turn_end}"
        return f"its first assistant turn ends at token {row.first_turn_end} of {len(row.ids)}, beyond the {longest} {what}: {cure}"

    def _read(self, located: dict[str, Located], alone: Collection[str], starting: Starting) -> dict[str, TopK]:
        """The distributions at the predicting positions of each row."""
        together = [name for name in located if name not in alone]
        found: dict[str, TopK] = {}
        for names in (together, *([name] for name in located if name in alone)):
            prompts = [located[name].ids.tolist() for name in names]
            answers = self._engine.prompt_logprobs(
                prompts,
                lambda numbers, names=names: starting([names[number] for number in numbers]),  # type: ignore[misc]
            )
            for name, answer in zip(names, answers, strict=True):
                found[name] = answer.at(located[name].position)
        return found


def label_bits(row: Located, top: TopK) -> float:
    """What the labels that have bytes cost, in bits; the ends of turns are left out, as they have none."""
    return float(-top.label_logprob[row.byte_end > row.byte_start].astype(np.float64).sum() / math.log(2))


def _row(row_id: str, row: Located, top: TopK) -> TeacherRow:
    return TeacherRow(
        row_id,
        row.ids,
        row.position,
        row.byte_start,
        row.byte_end,
        row.message,
        top.ids,
        top.logprobs.astype(np.float16),
        top.label_logprob,
    )


def _missing(conversation: Conversation, number: int, reason: str) -> Rejected:
    return Rejected(conversation.id, conversation.dataset, number, reason)
