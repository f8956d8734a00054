"""The method `fusechat` and the counted maps from Parquet to Parquet, against the slow reference over whole rows."""

import io
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from fusion_ray.alignment.counts import PairCounts
from fusion_ray.alignment.explain import side_by_side, source_kinds
from fusion_ray.alignment.token_strings import TokenStrings
from fusion_ray.config import AlignConfig
from fusion_ray.logprobs.codec import TeacherRow, encode, to_table
from fusion_ray.records import MatchKind
from fusion_ray.workers.align_counts import decode_counts, encode_counts
from fusion_ray.workers.align_setup import strings_of, vocabulary_of
from fusion_ray.workers.aligner import Aligner
from tests.reference import fusechat as reference
from tests.teaching import made_up_rows
from tests.tiny import make_tokenizer

CONTENTS = ("The quick brown fox.\n", "naß 👩‍🚀 Straße", "Yes")
K = 4
TOKENIZERS = {
    "bytelevel": make_tokenizer("bytelevel", template="chatml"),
    "sentencepiece": make_tokenizer("sentencepiece", template="inst", vocab_size=480),
}
SIZE = 640  # padded beyond both tokenizers
VOCABULARIES = {name: vocabulary_of(tokenizer, SIZE) for name, tokenizer in TOKENIZERS.items()}
STRINGS = {name: strings_of(tokenizer, SIZE) for name, tokenizer in TOKENIZERS.items()}
ROWS = {
    name: made_up_rows(tokenizer, CONTENTS, top_k=K, label_probability=0.4, seed=len(name))
    for name, tokenizer in TOKENIZERS.items()
}
PAIRS = list(itertools.permutations(TOKENIZERS))


def shard(rows: list[TeacherRow]) -> bytes:
    return encode(to_table(rows, top_k=K))


def aligner(pivot: str, source: str, counts: PairCounts | None = None, **config: object) -> Aligner:
    settings = AlignConfig(**({"method": "fusechat", "choose": "source"} | config))  # type: ignore[arg-type]
    strings = (STRINGS[pivot], STRINGS[source])
    return Aligner(VOCABULARIES[pivot], VOCABULARIES[source], settings, strings=strings, counts=counts)


def rows_of(data: bytes) -> list[dict]:
    return pq.read_table(io.BytesIO(data)).to_pylist()


def plain(strings: TokenStrings) -> reference.Side:
    return reference.Side(strings.decoded, strings.pieces, strings.marker, strings.bos, strings.eos, strings.unk)


def test_markers_are_asked_of_the_tokenizer() -> None:
    assert {name: strings.marker for name, strings in STRINGS.items()} == {"bytelevel": "Ġ", "sentencepiece": "▁"}
    bytelevel = STRINGS["bytelevel"]
    assert bytelevel.size == SIZE
    assert bytelevel.pieces[SIZE - 1] == bytelevel.decoded[SIZE - 1] == ""
    assert bytelevel.decoded[bytelevel.ids["Ġthe"]] == " the"
    assert bytelevel.pieces[bytelevel.eos] == bytelevel.decoded[bytelevel.eos] == "<|im_end|>"


@pytest.mark.parametrize("rules", ["exact", "min_edit", "statistics"])
@pytest.mark.parametrize(("pivot", "source"), PAIRS)
def test_every_position_is_what_the_published_rules_give(pivot: str, source: str, rules: str) -> None:
    mine, theirs = plain(STRINGS[pivot]), plain(STRINGS[source])
    both = list(zip(ROWS[pivot], ROWS[source], strict=True))
    paths = [reference.path(other.ids.tolist(), row.ids.tolist(), theirs, mine) for row, other in both]
    met: Counter[tuple[int, int]] = Counter()
    for lists, (row, other) in zip(paths, both, strict=True):
        met += reference.count(lists, other.ids.tolist(), row.ids.tolist())
    sides = shard(ROWS[pivot]), shard(ROWS[source])
    counts = aligner(pivot, source, map=rules).count(*sides)
    found = zip(counts.source_ids.tolist(), counts.pivot_ids.tolist(), counts.counts.tolist(), strict=True)
    assert {(s, p): count for s, p, count in found} == met

    mapped = {"exact": [], "min_edit": [], "statistics": reference.statistics_map(met, theirs, mine)}[rules]
    made = aligner(pivot, source, counts, map=rules)
    if rules == "min_edit":  # the maps have tests of their own
        mapped = made.mapped.tolist()
    result = made.align(*sides)
    transferred = fallbacks = 0
    for written, lists, (row, other) in zip(rows_of(result.encoded()), paths, both, strict=True):
        ids, logprobs = np.reshape(written["topk_ids"], (-1, K)), np.reshape(written["topk_logprobs"], (-1, K))
        stored = {int(position): number for number, position in enumerate(other.position)}
        assert all(written["has_target"])
        for at, position in enumerate(row.position.tolist()):
            choice = reference.choose(
                lists[position], other.ids.tolist(), int(row.ids[position]), rules, mapped, theirs, mine
            )
            if choice == reference.ONE_HOT or (isinstance(choice, int) and choice not in stored):
                expected = [(int(row.ids[position + 1]), 0.0)]
                fallbacks += 1
            else:
                pairs = []
                if isinstance(choice, int):
                    number = stored[choice]
                    pairs = list(
                        zip(other.topk_ids[number].tolist(), other.topk_logprobs[number].tolist(), strict=True)
                    )
                expected = reference.move(pairs, rules, mapped, theirs, mine)
                transferred += 1
            assert written["from_source"][at] == bool(expected)
            if not expected:  # an empty row: the pivot's own
                expected = list(zip(row.topk_ids[at].tolist(), row.topk_logprobs[at].tolist(), strict=True))
            used = int(np.isfinite(logprobs[at].astype(float)).sum())
            assert list(zip(ids[at, :used].tolist(), logprobs[at, :used].tolist(), strict=True)) == expected
    assert transferred > 10
    assert fallbacks > 0
    figures = result.coverage.summary(VOCABULARIES[pivot], VOCABULARIES[source])
    assert 0 < figures["one_hot"] < 1  # type: ignore[operator]
    assert (
        figures["coverage"]
        == aligner_of_spans(pivot, source)
        .align(*sides)
        .coverage.summary(  # comparable methods
            VOCABULARIES[pivot], VOCABULARIES[source]
        )["coverage"]
    )


def aligner_of_spans(pivot: str, source: str, counts: PairCounts | None = None, **config: object) -> Aligner:
    return Aligner(VOCABULARIES[pivot], VOCABULARIES[source], AlignConfig(**config), counts=counts)  # type: ignore[arg-type]


def test_equal_vocabularies_are_copied() -> None:
    rows = ROWS["bytelevel"]
    for rules in ("exact", "min_edit", "statistics"):
        made = aligner("bytelevel", "bytelevel", map=rules)
        assert made.count(shard(rows), shard(rows)).keys.size == 0
        for written, row in zip(rows_of(made.align(shard(rows), shard(rows)).encoded()), rows, strict=True):
            assert all(written["from_source"])
            assert written["topk_ids"] == row.topk_ids.reshape(-1).tolist()
            assert written["topk_logprobs"] == row.topk_logprobs.reshape(-1).tolist()
            assert set(written["kind"]) == {MatchKind.STRICT}


@pytest.mark.parametrize("choose", ["pivot", "min_ce"])
@pytest.mark.parametrize("per", ["sequence", "token"])
def test_where_the_pivot_wins_its_own_distribution_stays(choose: str, per: str) -> None:
    surer = made_up_rows(TOKENIZERS["bytelevel"], CONTENTS, top_k=K, label_probability=0.9)
    made = aligner("bytelevel", "sentencepiece", map="exact", choose=choose, per=per)
    for written, row in zip(
        rows_of(made.align(shard(surer), shard(ROWS["sentencepiece"])).encoded()), surer, strict=True
    ):
        assert not any(written["from_source"])
        assert written["topk_ids"] == row.topk_ids.reshape(-1).tolist()


def test_a_cut_source_row_is_one_hot_behind_the_cut() -> None:
    pivot = ROWS["bytelevel"][:1]
    whole = ROWS["sentencepiece"][:1]
    cut = made_up_rows(TOKENIZERS["sentencepiece"], CONTENTS[:1], top_k=K, max_length=len(whole[0].ids) - 6)
    made = aligner("bytelevel", "sentencepiece", map="exact")
    shares = [
        made.align(shard(pivot), shard(rows)).coverage.summary(made.pivot, made.source)["one_hot"]
        for rows in (whole, cut)
    ]
    assert shares[0] < shares[1]  # type: ignore[operator]


def test_a_token_outside_the_vocabulary_is_named_even_in_the_prompt() -> None:
    rows = list(ROWS["bytelevel"])
    ids = rows[1].ids.copy()
    ids[0] = SIZE
    rows[1] = replace(rows[1], ids=ids)
    result = aligner("bytelevel", "sentencepiece", map="exact").align(shard(rows), shard(ROWS["sentencepiece"]))
    assert [(row.id, row.reason) for row in result.rejected] == [
        ("row-1", f"the pivot has the token {SIZE}, outside the vocabulary of {SIZE}")
    ]


@pytest.mark.parametrize("method", ["spans", "fusechat"])
@pytest.mark.parametrize(("pivot", "source"), PAIRS)
def test_counts_of_shards_add_up_and_come_back_from_disk(pivot: str, source: str, method: str) -> None:
    made = aligner(pivot, source, map="statistics", method=method)
    whole = made.count(shard(ROWS[pivot]), shard(ROWS[source]))
    parts = [made.count(shard(ROWS[pivot][part]), shard(ROWS[source][part])) for part in (slice(1), slice(1, None))]
    total = parts[1] + parts[0]
    assert encode_counts(total) == encode_counts(whole)
    back = decode_counts(encode_counts(whole))
    assert (back.keys.tolist(), back.counts.tolist()) == (whole.keys.tolist(), whole.counts.tolist())
    with pytest.raises(ValueError, match="needs the counts of the corpus"):
        made.align(shard(ROWS[pivot]), shard(ROWS[source]))


def test_spans_with_statistics_sends_an_id_where_the_corpus_met_it_most() -> None:
    pivot, source = "bytelevel", "sentencepiece"
    sides = shard(ROWS[pivot]), shard(ROWS[source])
    counts = aligner_of_spans(pivot, source, map="statistics").count(*sides)
    assert counts.counts.sum() > 0
    made = aligner_of_spans(pivot, source, counts, map="statistics", choose="source")
    exact = aligner_of_spans(pivot, source, map="exact").mapped
    mine, theirs = VOCABULARIES[pivot], VOCABULARIES[source]
    for number in range(SIZE):
        pairs = counts.source_ids == number
        if exact[number] >= 0 or theirs.is_special[number]:
            assert made.mapped[number] == exact[number]
        elif not pairs.any():
            assert made.mapped[number] == -1
        else:
            ranked = [
                (
                    -count,
                    reference.levenshtein(theirs.pieces[number].decode("latin1"), mine.pieces[p].decode("latin1")),
                    p,
                )
                for p, count in zip(counts.pivot_ids[pairs].tolist(), counts.counts[pairs].tolist(), strict=True)
            ]
            assert made.mapped[number] == min(ranked)[2]
    assert all(row["source_won"] for row in rows_of(made.align(*sides).encoded()))


@pytest.mark.parametrize("rules", ["exact", "statistics"])
def test_a_row_is_explained_by_the_tokens_whose_rows_were_taken(rules: str) -> None:
    sides = shard(ROWS["bytelevel"]), shard(ROWS["sentencepiece"])
    counts = aligner("bytelevel", "sentencepiece", map=rules).count(*sides)
    made = aligner("bytelevel", "sentencepiece", counts, map=rules)
    (row,) = made.examples(*sides, {"row-0"}, 1)
    taken = [token["source_index"] for token in row["pivot"]]
    assert -1 in taken  # one-hot positions take none
    assert all(-1 <= index < len(row["source"]) for index in taken)
    assert sum(line.pivot is not None for line in side_by_side(row)) == len(row["pivot"])
    assert len(source_kinds(row)) == len(row["source"])
