"""Five tokenizers trained from the skills' own text: three byte-level BPEs, a BPE and a unigram with space markers and byte fallback.

All of them encode any Unicode text and none has a normaliser. Decoding gives the text back exactly, with one exception that every
SentencePiece-style tokenizer shares: a literal U+2581 (the space marker itself) comes back as a space.
"""

import itertools
import json
import math
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fusion_ray.zoo.catalogue import MAX_LENGTH, ZooModel
from fusion_ray.zoo.skills.item import draw_items
from fusion_ray.zoo.skills.table import SKILLS
from fusion_ray.zoo.templates import TEMPLATES, Template

BYTE_TOKENS = tuple(f"<0x{value:02X}>" for value in range(256))
SPACE_MARKER = "▁"
# A log score so low that the unigram model spells out the text `<0x41>` instead of taking it for the byte token of that name.
UNREACHABLE = -1000.0
# How the skills' text is cut before merges: words with their space, digits, runs of other signs, white space.
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def training_text(seed: int, rows_per_skill: int = 600) -> Iterator[str]:
    """Questions and answers of the training split drawn with `seed`, then every printable ASCII character and the numbers to 99."""
    for draw in SKILLS.values():
        for item in itertools.islice(draw_items(draw, "train", seed=seed), rows_per_skill):
            yield from item.questions
            yield from item.answers
    for role in ("system", "user", "assistant", "model", "### User:\n", "### Assistant:\n"):
        yield from itertools.repeat(role, 2 * rows_per_skill)
    yield from string.printable
    yield from (f" {number}" for number in range(100))


def byte_level_bpe(size: int, template: Template, *, split_digits: bool) -> Tokenizer:
    """Byte-level BPE of `size` entries in the manner of GPT-2, with the digits apart or together."""
    tokenizer = Tokenizer(models.BPE())
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    steps += [
        pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(token, special=True) for token in template.special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(size), trainer)
    return tokenizer


def sentencepiece(size: int, template: Template, *, unigram: bool, split_digits: bool) -> Tokenizer:
    """A BPE or unigram tokenizer over text whose spaces are U+2581, falling back to 256 byte tokens, as in Llama 2 and Gemma.

    The trainers of the `tokenizers` library know no byte fallback, so the pieces come first and the byte tokens are put before
    them as ordinary entries: text that spells `<0x41>` stays text. Line ends are cut off so that no piece straddles a role marker.
    """
    steps = [pre_tokenizers.Split("\n", behavior="isolated"), pre_tokenizers.Punctuation(behavior="isolated")]
    steps += [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    steps += [pre_tokenizers.Metaspace(replacement=SPACE_MARKER, prepend_scheme="never")]
    pre_tokenizer = pre_tokenizers.Sequence(steps)
    head = [*template.special, *BYTE_TOKENS]
    if unigram:
        vocabulary = [(token, 0.0) for token in template.special]
        vocabulary += [(token, UNREACHABLE) for token in BYTE_TOKENS]
        vocabulary += unigram_pieces(pre_tokenizer, size)[: size - len(head)]
        model: models.Model = models.Unigram(vocabulary, head.index("<unk>"), True)
    else:
        draft = Tokenizer(models.BPE())
        draft.pre_tokenizer = pre_tokenizer
        trainer = trainers.BpeTrainer(vocab_size=size - len(head), show_progress=False)
        draft.train_from_iterator(training_text(size), trainer)
        state = json.loads(draft.to_str())["model"]
        by_id = sorted(state["vocab"], key=state["vocab"].__getitem__)
        ids = {token: position for position, token in enumerate([*head, *by_id])}
        merges = [tuple(pair) for pair in state["merges"]]
        model = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARKER, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in template.special])
    return tokenizer


def unigram_pieces(pre_tokenizer: pre_tokenizers.PreTokenizer, seed: int, longest: int = 12) -> list[tuple[str, float]]:
    """Characters, then substrings of words by the characters they save (count times length less one), with log probabilities.

    It stands in for the library's unigram trainer, which breaks ties by hash, so that two runs give two vocabularies, and which
    proposes no substring that only one distinct word holds.
    """
    words = Counter(word for text in training_text(seed) for word, _ in pre_tokenizer.pre_tokenize_str(text))
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + longest, len(word)) + 1):
                counts[word[start:end]] += count
    ordered = sorted(counts, key=lambda piece: (len(piece) > 1, -counts[piece] * (len(piece) - 1), piece))
    return [(piece, math.log(counts[piece] / counts.total())) for piece in ordered]


def build(model: ZooModel) -> PreTrainedTokenizerFast:
    """The tokenizer of one model of the zoo, trained anew, with its chat template and special tokens."""
    template = TEMPLATES[model.template]
    if model.tokenizer == "byte_bpe":
        tokenizer = byte_level_bpe(model.vocabulary, template, split_digits=model.split_digits)
    else:
        unigram = model.tokenizer == "sentencepiece_unigram"
        tokenizer = sentencepiece(model.vocabulary, template, unigram=unigram, split_digits=model.split_digits)
    roles = {"eos_token": template.end_of_turn, "pad_token": template.pad}
    if template.bos:
        roles["bos_token"] = template.bos
    if "<unk>" in template.special:
        roles["unk_token"] = "<unk>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template.jinja,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        **roles,
    )


def save(model: ZooModel, folder: Path) -> PreTrainedTokenizerFast:
    """Train the tokenizer of `model` and write it to `folder` as a Hugging Face tokenizer with `chat_template.jinja`."""
    tokenizer = build(model)
    tokenizer.save_pretrained(folder)
    # The class name of transformers 5 is unknown to older readers; this one is known to all.
    config = folder / "tokenizer_config.json"
    written = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(written, indent=2) + "\n")
    return tokenizer
