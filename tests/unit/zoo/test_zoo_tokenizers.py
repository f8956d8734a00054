"""The five shipped tokenizers: lossless on any text, their digits, their chat templates and special tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusion_ray.zoo import tokenizers
from fusion_ray.zoo.catalogue import FOURTH, PIVOT, SOURCES, ZOO_MODELS, ZooModel
from fusion_ray.zoo.templates import TEMPLATES

MODELS = [pytest.param(model, id=model.name) for model in ZOO_MODELS.values()]
LOADED: dict[str, PreTrainedTokenizerFast] = {}

CHAT = [
    {"role": "user", "content": "Tom has 14 pens and buys 5 more. How many pens does Tom have now?"},
    {"role": "assistant", "content": "Tom has 19 pens now."},
    {"role": "user", "content": "Then — naïve 日本語 😀 — how many are left?"},
    {"role": "assistant", "content": "Ça dépend, 友だち: 'none' 🙃."},
]


def load(model: ZooModel) -> PreTrainedTokenizerFast:
    if model.name not in LOADED:
        LOADED[model.name] = AutoTokenizer.from_pretrained(model.path)
    return LOADED[model.name]


def sentencepiece(model: ZooModel) -> bool:
    return model.tokenizer.startswith("sentencepiece")


@pytest.mark.parametrize("model", MODELS)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back(model: ZooModel, text: str) -> None:
    if sentencepiece(model):
        text = text.replace("▁", "_")  # the space marker itself is the one exception, tested below
    tokenizer = load(model)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "text",
    [
        "  two  spaces  ",
        "\n\n a\r\n\tb",
        "e\u0301 ﬁ Å",
        "<0x41> literal",
        "\x00\x7f",
        "don't  DON'T",
        "日本語😀" * 3,
        "12345 007",
    ],
)
def test_awkward_text_comes_back(model: ZooModel, text: str) -> None:
    tokenizer = load(model)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("model", MODELS)
def test_every_byte_has_a_token(model: ZooModel) -> None:
    vocabulary = load(model).get_vocab()
    if sentencepiece(model):
        assert set(tokenizers.BYTE_TOKENS) <= set(vocabulary)
    else:
        assert set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) <= set(vocabulary)


@pytest.mark.parametrize("model", MODELS)
def test_the_space_marker_is_a_space_to_sentencepiece_alone(model: ZooModel) -> None:
    tokenizer = load(model)
    assert tokenizer.decode(tokenizer.encode("a▁b", add_special_tokens=False)) == (
        "a b" if sentencepiece(model) else "a▁b"
    )


@pytest.mark.parametrize("model", MODELS)
def test_digits_are_split_or_not_as_the_catalogue_says(model: ZooModel) -> None:
    tokenizer = load(model)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(" 37", add_special_tokens=False)]
    assert ("37" in "|".join(pieces)) is not model.split_digits


@pytest.mark.parametrize("model", MODELS)
def test_training_again_gives_the_shipped_tokenizer(model: ZooModel) -> None:
    built, shipped = tokenizers.build(model), load(model)
    # transformers puts Qwen's own pre-tokenizer and normaliser into any folder whose config says qwen2, hence the whole pipeline.
    assert built.backend_tokenizer.to_str() == shipped.backend_tokenizer.to_str()
    assert built.get_vocab() == shipped.get_vocab()
    assert built.chat_template == shipped.chat_template == TEMPLATES[model.template].jinja
    for message in CHAT:
        assert built.encode(message["content"]) == shipped.encode(message["content"])


@pytest.mark.parametrize("model", MODELS)
def test_two_turns_render_with_the_content_verbatim_and_its_end_of_turn(model: ZooModel) -> None:
    tokenizer = load(model)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    at = 0
    for message in CHAT:
        at = text.index(message["content"], at) + len(message["content"])
        if message["role"] == "assistant":
            assert text[at:].startswith(tokenizer.eos_token)
    ids = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(tokenizer.eos_token_id) >= 2
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("model", MODELS)
def test_the_prompt_and_the_reply_are_the_whole_conversation(model: ZooModel) -> None:
    """Tokens never straddle the borders of a reply, so a model meets in use the very ids it was trained on."""
    tokenizer = load(model)
    for turn in (1, 3):
        prompt = tokenizer.apply_chat_template(
            CHAT[:turn], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        reply = tokenizer.encode(CHAT[turn]["content"], add_special_tokens=False)
        whole = tokenizer.apply_chat_template(CHAT[: turn + 1], tokenize=True, return_dict=False)
        assert whole[: len(prompt) + len(reply) + 1] == [*prompt, *reply, tokenizer.eos_token_id]


@pytest.mark.parametrize("model", MODELS)
def test_a_system_message_is_rendered_or_refused_with_a_reason(model: ZooModel) -> None:
    tokenizer = load(model)
    chat = [{"role": "system", "content": "Answer in one sentence."}, *CHAT]
    if model.template == "turns":
        with pytest.raises(TemplateError, match="no system role"):
            tokenizer.apply_chat_template(chat, tokenize=False)
    else:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert "Answer in one sentence." in text
        assert text.index("Answer in one sentence.") < text.index(CHAT[0]["content"])
    with pytest.raises(TemplateError, match="the role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("model", MODELS)
def test_special_tokens_are_special_and_the_end_of_turn_is_eos(model: ZooModel) -> None:
    tokenizer, template = load(model), TEMPLATES[model.template]
    assert tokenizer.eos_token == template.end_of_turn
    assert tokenizer.pad_token == template.pad
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert special == set(template.special)
    assert tokenizer.decode(tokenizer.encode("".join(template.special)), skip_special_tokens=True) == ""


def test_no_two_models_share_a_tokenizer_a_template_or_a_family() -> None:
    models = (PIVOT, *SOURCES, FOURTH)
    assert len({model.family for model in models}) == len({model.template for model in models}) == 5
    assert len({tuple(load(model).encode(CHAT[0]["content"])) for model in models}) == 5
    assert len({model.vocabulary for model in models}) == 5
