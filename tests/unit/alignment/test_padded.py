"""Padded vocabularies and added tokens, from model folders on disk to aligned rows: their mass goes to the tail, nothing breaks, nothing is rejected."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from fusion_ray.alignment.maps import MAPS
from fusion_ray.alignment.vocabulary import Vocabulary
from fusion_ray.config import AlignConfig, ModelConfig
from fusion_ray.logprobs.codec import TeacherRow, encode, to_table
from fusion_ray.records import MatchKind
from fusion_ray.workers.align_setup import load_vocabulary
from fusion_ray.workers.aligner import AlignedShard, Aligner
from fusion_ray.zoo.catalogue import ZOO_MODELS
from tests.teaching import made_up_rows

PADDING = 64
ADDED, CONTROL = "fusionray", "<|tool|>"
CONTENTS = (
    f"I am {ADDED}, a model.",
    f"{ADDED}{ADDED}",
    f"Call {CONTROL} now.",
    CONTROL,
    "No added token here: 12 + 30 = 42.",
)
K = 4


def padded_folder(folder: Path, name: str) -> ModelConfig:
    """A copy of a zoo model without its weights: an ordinary and a special token added, and PADDING more rows in its embedding than that."""
    folder.mkdir()
    for file in Path(ZOO_MODELS[name].path).iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens([ADDED, AddedToken(CONTROL, special=True)]) == 2
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = len(tokenizer) + PADDING
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig(name=name, path=str(folder))


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    root = tmp_path_factory.mktemp("padded")
    return {name: padded_folder(root / name, name) for name in ("pivot", "source_gemma")}


@pytest.fixture(scope="module")
def plain() -> dict[str, ModelConfig]:
    return {name: ModelConfig(name=name, path=str(ZOO_MODELS[name].path)) for name in ("pivot", "source_gemma")}


def rows_of(model: ModelConfig, *, beyond: bool, label_probability: float = 0.5) -> list[TeacherRow]:
    """Made-up rows; `beyond`: at every position the last two candidates are ids that no token has."""
    rows = made_up_rows(
        AutoTokenizer.from_pretrained(model.path), CONTENTS, top_k=K, label_probability=label_probability
    )
    if not beyond:
        return rows
    last = load_vocabulary(model).size - 1
    made = []
    for row in rows:
        ids = row.topk_ids.copy()
        ids[:, 2:] = [last, last - PADDING + 1]
        made.append(replace(row, topk_ids=ids))
    return made


def align(
    pivot: ModelConfig, source: ModelConfig, rows: tuple[list[TeacherRow], list[TeacherRow]], **config: object
) -> AlignedShard:
    aligner = Aligner(load_vocabulary(pivot), load_vocabulary(source), AlignConfig(choose="source", **config))  # type: ignore[arg-type]
    mine, theirs = (encode(to_table(side, top_k=K)) for side in rows)
    return aligner.align(mine, theirs)


def written(shard: AlignedShard) -> list[dict]:
    return pq.read_table(io.BytesIO(shard.encoded())).to_pylist()


def test_a_padded_vocabulary_has_ids_without_bytes(
    padded: dict[str, ModelConfig], plain: dict[str, ModelConfig]
) -> None:
    words, bare = load_vocabulary(padded["pivot"]), load_vocabulary(plain["pivot"])
    assert words.size == bare.size + 2 + PADDING
    assert words.pieces[bare.size : bare.size + 2] == (ADDED.encode(), CONTROL.encode())
    assert set(words.pieces[-PADDING:]) == {b""}
    assert words.special == bare.special | {bare.size + 1}
    assert words.id_of(ADDED.encode()) == bare.size
    assert words.id_of(CONTROL.encode()) == -1  # met by role, and it has none


@pytest.mark.parametrize("vocabulary_map", MAPS)
def test_every_map_sends_padding_and_control_tokens_to_the_tail(
    padded: dict[str, ModelConfig], plain: dict[str, ModelConfig], vocabulary_map: str
) -> None:
    for source, pivot in (("source_gemma", "pivot"), ("pivot", "source_gemma")):
        theirs, ours = load_vocabulary(padded[source]), load_vocabulary(plain[pivot])
        mapped = MAPS[vocabulary_map](theirs, ours)
        added = theirs.size - PADDING - 2
        assert (mapped[-PADDING:] == -1).all()
        assert mapped[added + 1] == -1
        if vocabulary_map == "exact":
            assert mapped[added] == -1
        elif vocabulary_map != "min_edit":  # which takes any id whose string is close
            assert ADDED.encode().startswith(ours.pieces[mapped[added]])
        assert (
            MAPS[vocabulary_map](load_vocabulary(padded[source]), load_vocabulary(padded[pivot])).max() < ours.size + 2
        )
        assert mapped.max() < ours.size


def test_padding_apart_a_vocabulary_is_itself(plain: dict[str, ModelConfig]) -> None:
    words = load_vocabulary(plain["pivot"])
    longer = replace(words, pieces=(*words.pieces, *[b""] * PADDING))
    for name, make in MAPS.items():
        assert (make(longer, words)[: words.size] == np.arange(words.size)).all(), name
        assert (make(longer, words)[words.size :] == -1).all(), name
        assert (make(words, longer) == np.arange(words.size)).all(), name


@pytest.mark.parametrize("inside", ["skip", "label", "condition"])
@pytest.mark.parametrize("vocabulary_map", MAPS)
@pytest.mark.parametrize(
    ("pivot", "source"), [("pivot", "source_gemma"), ("source_gemma", "pivot"), ("pivot", "pivot")]
)
def test_padded_ids_and_added_tokens_in_the_rows_are_aligned(
    padded: dict[str, ModelConfig],
    plain: dict[str, ModelConfig],
    pivot: str,
    source: str,
    vocabulary_map: str,
    inside: str,
) -> None:
    for ours, theirs in ((padded, padded), (plain, padded), (padded, plain)):
        sides = rows_of(ours[pivot], beyond=ours is padded), rows_of(theirs[source], beyond=theirs is padded)
        shard = align(ours[pivot], theirs[source], sides, map=vocabulary_map, inside=inside)
        assert shard.rejected == []
        size = load_vocabulary(ours[pivot]).size
        for row, mine in zip(written(shard), sides[0], strict=True):
            ids = np.reshape(row["topk_ids"], (-1, K))
            probabilities = np.exp(np.reshape(row["topk_logprobs"], (-1, K)).astype(float))
            assert ((ids >= 0) & (ids < size)).all()
            assert (probabilities.sum(axis=1) <= 1.01).all()
            assert len(row["kind"]) == len(mine.position)
            kinds = np.array(row["kind"])
            same = np.isin(kinds, (MatchKind.STRICT, MatchKind.COMPARABLE))
            assert np.array(row["has_target"])[same].any() or not same.any()


def test_the_mass_of_padding_goes_to_the_tail(padded: dict[str, ModelConfig]) -> None:
    theirs = rows_of(padded["source_gemma"], beyond=True)
    other = [
        replace(
            row,
            topk_ids=np.where(row.topk_ids >= load_vocabulary(padded["source_gemma"]).size - PADDING, 7, row.topk_ids),
        )
        for row in theirs
    ]
    mine = rows_of(padded["pivot"], beyond=True)
    lost, kept = (
        align(padded["pivot"], padded["source_gemma"], (mine, rows), map="prefix", chain=False).coverage
        for rows in (theirs, other)
    )
    given = [np.exp(row.topk_logprobs[:, 2:].astype(float)).sum(axis=1) for row in theirs]
    assert lost.projected == kept.projected
    assert kept.mass - lost.mass > 0.25 * sum(share.sum() for share in given)
    assert lost.mass < lost.projected * 0.95


def test_an_added_token_in_the_text_meets_the_tokens_of_the_other_side(
    padded: dict[str, ModelConfig], plain: dict[str, ModelConfig]
) -> None:
    sides = rows_of(padded["pivot"], beyond=False), rows_of(plain["source_gemma"], beyond=False)
    result = written(align(padded["pivot"], plain["source_gemma"], sides))
    for number, text, tokens in ((1, ADDED, 2), (3, CONTROL, 1)):  # the text is the added token and nothing else
        assert (sides[0][number].byte_end - sides[0][number].byte_start).tolist() == [len(text)] * tokens + [0]
        assert result[number]["kind"] == [MatchKind.COMPARABLE] * tokens + [MatchKind.STRICT]
        assert all(result[number]["has_target"])
    # The other way round, within the source's control token: it has no bytes, so that all that can be known is that its own text goes on.
    for inside in ("skip", "condition"):
        turned = written(align(plain["source_gemma"], padded["pivot"], sides[::-1], inside=inside))[3]
        label = sides[1][3].ids[sides[1][3].position + 1]
        within = np.flatnonzero(np.array(turned["kind"]) == MatchKind.INSIDE)
        assert within.size
        for at in within:
            ids, logprobs = (turned[name][at * K : (at + 1) * K] for name in ("topk_ids", "topk_logprobs"))
            known = [token for token, logprob in zip(ids, logprobs, strict=True) if logprob > -np.inf]
            assert known == ([] if inside == "skip" else [label[at]])
            assert inside == "skip" or logprobs[0] == 0.0


def test_an_id_beyond_the_padding_is_a_fault_of_the_row(
    padded: dict[str, ModelConfig], plain: dict[str, ModelConfig]
) -> None:
    theirs = rows_of(padded["source_gemma"], beyond=True)
    shard = align(plain["pivot"], plain["source_gemma"], (rows_of(plain["pivot"], beyond=False), theirs))
    assert [row.id for row in shard.rejected] == [row.id for row in theirs]
    size = load_vocabulary(plain["source_gemma"]).size
    assert f"the source has an id outside the vocabulary of {size}" in shard.rejected[0].reason


def test_a_vocabulary_of_padding_alone_maps_to_nothing() -> None:
    empty, words = Vocabulary((b"",) * 3), Vocabulary((b"a", b"b"))
    for make in (MAPS["exact"], MAPS["prefix"]):
        assert make(empty, words).tolist() == [-1, -1, -1]
        assert make(words, empty).tolist() == [-1, -1]
