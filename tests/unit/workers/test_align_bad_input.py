"""What align is given and must refuse: a row is rejected with its reason and counted, a model is named with the token that cannot be aligned."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusion_ray.config import AlignConfig, ModelConfig
from fusion_ray.corpus.spans import Locator
from fusion_ray.corpus.template import UnlocatedError
from fusion_ray.logprobs.codec import TeacherRow, encode, to_table
from fusion_ray.records import Message
from fusion_ray.workers.align_setup import load_vocabulary, vocabulary_of
from fusion_ray.workers.aligner import AlignedShard, Aligner
from fusion_ray.zoo.catalogue import ZOO_MODELS
from tests.teaching import made_up_rows
from tests.tiny import TEMPLATES, make_tokenizer

CONTENTS = ("The quick brown fox.", "naïve 漢字 👩‍🚀", "Yes")
PIVOT = make_tokenizer("bytelevel", template="chatml")
SOURCE = make_tokenizer("sentencepiece", template="inst", vocab_size=480)
K, SIZE = 4, 640
ALIGNER = Aligner(vocabulary_of(PIVOT, vocab_size=SIZE), vocabulary_of(SOURCE, vocab_size=SIZE), AlignConfig())


def shard(rows: list[TeacherRow]) -> bytes:
    return encode(to_table(rows, top_k=K))


def align(pivot: list[TeacherRow], source: list[TeacherRow]) -> AlignedShard:
    return ALIGNER.align(shard(pivot), shard(source))


def broken(rows: list[TeacherRow], name: str, value: float) -> list[TeacherRow]:
    """The second row with `value` at the third place of column `name`."""
    values = getattr(rows[1], name).copy()
    values.reshape(-1)[2] = value
    return [rows[0], replace(rows[1], **{name: values}), rows[2]]


@pytest.mark.parametrize("side", ["pivot", "source"])
@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("topk_ids", SIZE, f"an id outside the vocabulary of {SIZE} at position"),
        ("topk_ids", -1, f"an id outside the vocabulary of {SIZE} at position"),
        ("topk_logprobs", np.nan, "a log-probability that is NaN at position"),
        ("label_logprob", np.nan, "a log-probability that is NaN at position"),
        ("topk_logprobs", 0.25, "a positive log-probability at position"),
        ("label_logprob", np.inf, "a positive log-probability at position"),
        ("label_logprob", -np.inf, "a label of probability zero at position"),
        ("byte_start", 99, "token spans out of order at position"),
        ("byte_end", 0, "token spans out of order at position"),
        ("message", 0, "token spans out of order at position"),
    ],
)
def test_a_row_with_a_fault_is_rejected_with_its_reason_and_counted(
    side: str, column: str, value: float, reason: str
) -> None:
    pivot, source = made_up_rows(PIVOT, CONTENTS), made_up_rows(SOURCE, CONTENTS)
    if side == "pivot":
        pivot = broken(pivot, column, value)
    else:
        source = broken(source, column, value)
    result = align(pivot, source)
    assert (result.rows, result.coverage.rows) == (2, 2)
    (row,) = result.rejected
    assert row.id == "row-1"
    assert row.reason.startswith(f"the {side} has {reason} ")
    assert row.reason.rsplit(" ", 1)[1].isdigit()


@pytest.mark.parametrize(("outside", "side"), [(SIZE, "pivot"), (-5, "source")])
def test_a_label_outside_the_vocabulary_is_a_fault(outside: int, side: str) -> None:
    sides = {"pivot": made_up_rows(PIVOT, CONTENTS), "source": made_up_rows(SOURCE, CONTENTS)}
    ids = sides[side][1].ids.copy()
    ids[sides[side][1].position[0] + 1] = outside
    sides[side][1] = replace(sides[side][1], ids=ids)
    result = align(sides["pivot"], sides["source"])
    assert [row.id for row in result.rejected] == ["row-1"]
    assert f"the {side} has an id outside the vocabulary of {SIZE} at position" in result.rejected[0].reason


@pytest.mark.parametrize(
    ("other", "lengths", "at"),
    [
        ("The quick brown ox.", "(pivot 20 bytes, source 19 bytes)", 16),
        ("The quick brown fox!", "(pivot 20 bytes, source 20 bytes)", 19),
        ("The quick brown fox. Yes.", "(pivot 20 bytes, source 25 bytes)", 20),
        ("A quick brown fox.", "(pivot 20 bytes, source 18 bytes)", 0),
        ("", "(pivot 20 bytes, source 0 bytes)", 20),
    ],
)
def test_different_text_names_the_row_both_lengths_and_where_it_begins(other: str, lengths: str, at: int) -> None:
    result = align(made_up_rows(PIVOT, CONTENTS), made_up_rows(SOURCE, [other, *CONTENTS[1:]]))
    (row,) = result.rejected
    assert row.id == "row-0"
    assert f"different text on the two sides of message 1 {lengths}, from byte " in row.reason
    # the token that holds the first other byte, or the end of the turn
    assert at - 6 <= int(row.reason.rsplit(" ", 1)[1]) <= at


def test_a_space_marker_in_the_text_is_a_blank_to_sentencepiece_and_rejects_the_row() -> None:
    contents = ("bars ▁▂▃", "Yes")
    result = align(made_up_rows(PIVOT, contents), made_up_rows(SOURCE, contents))
    (row,) = result.rejected
    assert row.id == "row-0"
    assert "the source's token" in row.reason
    assert "b' ', 1 bytes, and covers 3" in row.reason


def test_a_row_with_many_faults_is_counted_once() -> None:
    pivot = broken(broken(made_up_rows(PIVOT, CONTENTS), "topk_logprobs", np.nan), "topk_ids", SIZE)
    source = broken(made_up_rows(SOURCE, CONTENTS), "label_logprob", 3.0)
    result = align(pivot, source)
    assert [row.id for row in result.rejected] == ["row-1"]


def test_a_shard_of_faults_alone_gives_no_rows_and_all_reasons() -> None:
    pivot = [
        replace(row, label_logprob=np.full_like(row.label_logprob, np.nan)) for row in made_up_rows(PIVOT, CONTENTS)
    ]
    result = align(pivot, made_up_rows(SOURCE, CONTENTS))
    assert (result.rows, len(result.rejected)) == (0, len(CONTENTS))
    assert result.coverage.summary(ALIGNER.pivot, ALIGNER.source)["coverage"] == dict.fromkeys(
        ("strict", "comparable", "inside", "none"), 0.0
    )


def wordpiece(**options: object) -> PreTrainedTokenizerFast:
    """In BERT's manner: lower-cased words whose later pieces begin with ##."""
    words = ["[PAD]", "[UNK]", "[SEP]", "play", "##ing", "the", "quick"]
    core = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", sep_token="[SEP]", **options
    )


def test_a_model_whose_tokenizer_has_no_byte_exact_pieces_is_named_with_the_first_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "bert-like"
    wordpiece(chat_template=TEMPLATES["chatml"]).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 7}))
    model = ModelConfig(name="bert", path=str(folder))
    expected = r"the tokenizer .*bert-like is not byte-exact: its token 'play' \(id 3\) does not say which bytes"
    with pytest.raises(ValueError, match=expected):
        load_vocabulary(model)
    with pytest.raises(ValueError, match=expected):  # whichever side it is
        Aligner.of_models(ModelConfig(name="pivot", path=str(ZOO_MODELS["pivot"].path)), model, AlignConfig())


@pytest.mark.parametrize(
    ("normalizer", "text", "same"),
    [
        (normalizers.Lowercase(), "Hello", "hello"),
        (normalizers.NFC(), "cafe\u0301", "caf\u00e9"),
        (normalizers.NFKC(), "ﬁne", "fine"),
    ],
)
def test_a_tokenizer_that_rewrites_the_text_is_refused_row_by_row(
    normalizer: normalizers.Normalizer, text: str, same: str
) -> None:
    tokenizer = make_tokenizer(
        "bytelevel", template="{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer.backend_tokenizer.normalizer = normalizer
    locator = Locator(tokenizer)
    assert locator.locate([Message("user", "a"), Message("assistant", same)]).bytes == len(same.encode())
    with pytest.raises(UnlocatedError, match=r"assistant message 1 do not give back its bytes .* normalises this text"):
        locator.locate([Message("user", "a"), Message("assistant", text)])
