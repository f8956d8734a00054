"""Assistant bytes are located by proof in every template family and for any Unicode text, whatever the tokenizer adds, swallows or splits."""

import itertools
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusion_ray.corpus.pieces import read_pieces
from fusion_ray.corpus.spans import Located, Locator, end_of_turn_id, render_prompt
from fusion_ray.corpus.template import UnlocatedError
from fusion_ray.records import Message
from tests.tiny import make_tokenizer
from tests.unit.corpus.families import FAMILIES, NO_END_OF_TURN, NO_SYSTEM

KINDS = ("bytelevel", "sentencepiece", "sentencepiece-noprefix")
TOKENIZERS = {kind: make_tokenizer(kind, vocab_size=500) for kind in KINDS}
# Family emoji of several code points, combining marks, CJK, the space marker itself, tabs: all split over tokens by these vocabularies.
HARD = "  naïve 漢字 👩‍👩‍👧 e\u0301 ▁x▁\t\u00a0é\n- done  "
CHAT = (
    Message("system", "Be  brief. "),
    Message("user", " What?\n"),
    Message("assistant", HARD),
    Message("user", "And\t2+2?"),
    Message("assistant", "It is 4."),
)


def locator(kind: str, template: str) -> Locator:
    tokenizer = TOKENIZERS[kind]
    tokenizer.chat_template = template
    return Locator(tokenizer, name="mine")


def covered(row: Located, messages: tuple[Message, ...]) -> dict[int, bytes]:
    """For each assistant message the bytes that its positions cover, from the spans alone; every span must follow the one before."""
    found: dict[int, bytes] = {}
    for number in {int(m) for m in row.message}:
        content = messages[number].content.encode()
        spans = [
            (int(a), int(b)) for a, b, m in zip(row.byte_start, row.byte_end, row.message, strict=True) if m == number
        ]
        body = [span for span in spans if span[1] > span[0]]
        assert all(first[1] == second[0] for first, second in itertools.pairwise(body))
        assert [span for span in spans if span[0] == span[1]] in ([], [(len(content), len(content))])
        found[number] = content[body[0][0] : body[-1][1]] if body else b""
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_located(family: str, kind: str) -> None:
    messages = CHAT[1:] if family in NO_SYSTEM else CHAT
    place = locator(kind, FAMILIES[family])
    row = place.locate(messages)
    for number, content in covered(row, messages).items():
        original = messages[number].content.encode()
        assert content in (original, original.strip(), original.lstrip(b"\n"), HARD.strip().encode())
    assert len(covered(row, messages)) == 2
    assert (np.diff(row.position) > 0).all()
    # The pieces of the labels are the bytes that they are said to cover, but for what is clipped at a border.
    pieces = place.pieces.of(row.labels.tolist())
    whole = sum(
        piece.strip() in messages[m].content.encode()[a:b] or b"\xe2\x96\x81" in messages[m].content.encode()[a:b]
        for piece, a, b, m in zip(pieces, row.byte_start, row.byte_end, row.message, strict=True)
        if b > a
    )
    assert whole >= int((row.byte_end > row.byte_start).sum()) - 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NO_END_OF_TURN])
def test_the_end_of_turn_is_the_label_at_the_end_positions(family: str, kind: str) -> None:
    place = locator(kind, FAMILIES[family])
    end = end_of_turn_id(place.tokenizer)
    row = place.locate(CHAT[3:])
    assert row.labels[row.byte_start == row.byte_end].tolist() == [end]
    if family != "llama2":  # puts a space before its end token
        assert place.tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"


def test_a_template_without_an_end_of_turn_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"one and the same token; it ends them with .*nothing of its own"):
        end_of_turn_id(
            locator("bytelevel", "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}").tokenizer
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["chatml", "llama3", "alpaca", "mistral1"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_text_is_tiled(kind: str, family: str, data: st.DataObject) -> None:
    special = st.sampled_from(
        ["<|im_end|>", "<s>", "▁", "<0x41>", " ", "\n", "\r\n", "xPLACE1HOLDERx", "{{", "\u200d", "\u0000"]
    )
    text = st.lists(st.one_of(st.text(max_size=12), special), max_size=8).map("".join)
    messages = (Message("user", data.draw(text)), Message("assistant", data.draw(text)))
    row = locator(kind, FAMILIES[family]).locate(messages)
    content = messages[1].content
    expected = (content.strip() if family == "llama3" else content).encode()
    assert covered(row, messages).get(1, b"") == expected
    assert row.bytes == len(expected)
    start = len(content.encode()) - len(content.lstrip().encode()) if family == "llama3" and content.strip() else 0
    assert (row.byte_start[0] if expected else 0) == start


def one_a_character() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({c: n for n, c in enumerate("?abcé:\n")}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")]
    )
    template = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", chat_template=template)


def test_positions_predict_the_labels_they_name() -> None:
    """A case with its answer: one token a character, so that every number can be read off."""
    tokenizer = one_a_character()
    row = Locator(tokenizer).locate((Message("user", "b"), Message("assistant", "aéc")))
    text = "u:b\na:aéc\n"
    assert len(row.ids) == len(text)
    assert row.position.tolist() == [5, 6, 7, 8]
    assert row.byte_start.tolist() == [0, 1, 3, 4]
    assert row.byte_end.tolist() == [1, 3, 4, 4]
    assert row.message.tolist() == [1, 1, 1, 1]
    assert [text[p + 1] for p in row.position] == ["a", "é", "c", "\n"]
    cut = row.cut(8)
    assert cut.position.tolist() == [5, 6]
    assert (len(cut.ids), cut.bytes) == (8, 3)
    assert row.cut(10) is row
    with pytest.raises(UnlocatedError, match="assistant message 1 do not give back its bytes"):
        Locator(tokenizer).locate((Message("user", "b"), Message("assistant", "axc")))
    assert Locator(tokenizer).locate((Message("user", "xyz"), Message("assistant", "a"))).bytes == 1


def test_a_long_row_ends_with_its_last_whole_turn() -> None:
    """One token a character: the turns of "u:b", "a:ac" end with the tokens 9, 18 and 27 of 30, their line ends being the ends of turns."""
    tokenizer = one_a_character()
    turns = [("user", "b"), ("assistant", "ac")] * 3 + [("user", "b")]
    row = Locator(tokenizer).locate([Message(role, content) for role, content in turns])
    ends = [9, 18, 27]
    assert (len(row.ids), row.turns, row.first_turn_end) == (31, 3, 9)
    assert (row.position[row.byte_start == row.byte_end] + 2).tolist() == ends
    for length in range(1, 31):
        kept = row.cut_after_turn(length)
        whole = sum(end <= length for end in ends)
        assert (len(kept.ids), kept.turns) == ([0, *ends][whole], whole)
        assert kept.position.tolist() == row.position[row.position + 1 < len(kept.ids)].tolist()
        assert kept.bytes == 2 * whole
        assert all(len(column) == len(kept.position) for column in (kept.byte_start, kept.byte_end, kept.message))
    assert row.cut_after_turn(31) is row


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NO_END_OF_TURN])
def test_a_cut_row_ends_with_the_end_of_a_turn(family: str, kind: str) -> None:
    place = locator(kind, FAMILIES[family])
    row = place.locate(CHAT[1:] if family in NO_SYSTEM else CHAT)
    kept = row.cut_after_turn(int(row.position[-1]) + 1)  # one token short of the last end of turn
    assert (row.turns, kept.turns) == (2, 1)
    assert kept.ids[-1] == end_of_turn_id(place.tokenizer)
    assert kept.labels[-1] == kept.ids[-1]


def test_added_tokens_that_swallow_white_space() -> None:
    tokenizer = make_tokenizer("bytelevel", template=FAMILIES["phi"])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|assistant|>", rstrip=True, special=True)]}
    )
    tokenizer.add_tokens([AddedToken("<|im_end|>", lstrip=True, special=True)])
    messages = (Message("user", "Hi"), Message("assistant", "  two spaces each  "))
    row = Locator(tokenizer).locate(messages)
    body = row.byte_end > row.byte_start
    assert messages[1].content.encode()[row.byte_start[body][0] : row.byte_end[body][-1]] == b"two spaces each"
    assert row.byte_start[~body].tolist() == [19]
    assert tokenizer.convert_ids_to_tokens(row.labels[~body].tolist()) == ["<|im_end|>"]


def test_refusals_and_changes_name_the_reason() -> None:
    with pytest.raises(UnlocatedError, match="mine refuses the conversation: System role not supported"):
        locator("bytelevel", FAMILIES["gemma"]).locate(CHAT)
    with pytest.raises(UnlocatedError, match="changes the contents"):
        locator("bytelevel", FAMILIES["thinking"]).locate((CHAT[1], Message("assistant", "<think>x</think>y")))
    with pytest.raises(UnlocatedError, match="changes white space"):
        locator("bytelevel", "{% for m in messages %}{{ m['content'] | replace(' ', '') }}{% endfor %}").locate(CHAT)
    with pytest.raises(UnlocatedError, match=r"message 2 \(assistant\) 0 times"):
        locator("bytelevel", "{% for m in messages %}{{ m['content'] if m['role'] == 'user' }}{% endfor %}").locate(
            CHAT
        )
    with pytest.raises(ValueError, match="the tokenizer of bare has no chat template"):
        Locator(make_tokenizer(template=None), name="bare")


def test_a_conversation_of_thousands_of_messages() -> None:
    messages = (
        Message("user", "Go on."),
        Message("assistant", " Yes. "),
    ) * 1500  # Python's stack ends at a thousand calls
    row = locator("bytelevel", FAMILIES["llama3"]).locate(messages)
    assert covered(row, messages) == {number: b"Yes." for number in range(1, 3000, 2)}


def test_a_template_that_breaks_down_is_a_reason() -> None:
    place = locator("bytelevel", "{{ messages[0].content + 1 }}")
    with pytest.raises(UnlocatedError, match="the chat template of mine fails on the conversation: TypeError"):
        place.locate(CHAT)


def test_another_models_template() -> None:
    """corpus.template: pivot. The pivot's control tokens become ordinary text for the other tokenizer."""
    pivot = make_tokenizer("bytelevel", template=FAMILIES["llama3"].replace("<|im_end|>", "<|eot|>"))
    place = Locator(make_tokenizer("sentencepiece", template=None), template=pivot, name="other")
    row = place.locate(CHAT)
    assert place.tokenizer.decode(row.ids).replace(" ", "").count("<|eot|>") == 5
    assert covered(row, CHAT)[4] == b"It is 4."


def test_the_prompt_asks_for_the_next_turn() -> None:
    tokenizer = make_tokenizer("bytelevel")
    assert (
        tokenizer.decode(render_prompt(tokenizer, [Message("user", "Hi")]))
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_pieces_of_both_families_and_of_padding() -> None:
    pieces = read_pieces(TOKENIZERS["bytelevel"], vocab_size=512)
    assert len(pieces.pieces) == 512
    assert pieces.of([511, 9999]) == [b"", b""]
    assert {bytes([value]) for value in range(256)} <= set(pieces.pieces)
    assert pieces.special == {0, 1, 2, 3, 4}
    assert pieces.pieces[4] == b"<|im_end|>"
    assert (pieces.dummy_prefix, pieces.space_marker) == (False, False)
    other = TOKENIZERS["sentencepiece"]
    pieces = read_pieces(other)
    ids = other.backend_tokenizer.encode("é 漢", add_special_tokens=False).ids
    assert b"".join(pieces.of(ids)) == " é 漢".encode()
    assert pieces.pieces[other.convert_tokens_to_ids("<0x41>")] == b"A"
    assert (pieces.dummy_prefix, pieces.space_marker) == (True, True)


def test_a_tokenizer_that_is_not_byte_exact_is_named() -> None:
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    tokenizer.name_or_path = "some/bert"
    with pytest.raises(ValueError, match=r"tokenizer some/bert is not byte-exact: its token '(\[UNK\]|play)'"):
        read_pieces(tokenizer)


def test_a_short_row_takes_less_than_two_milliseconds() -> None:
    place = locator("sentencepiece", FAMILIES["llama3"])
    place.locate(CHAT)
    took = []
    for _ in range(200):
        started = time.perf_counter()
        place.locate(CHAT)
        took.append(time.perf_counter() - started)
    assert float(np.median(took)) < 2e-3, json.dumps(took[:5])
