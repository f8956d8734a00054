"""The vocabularies of two models and the map between them, which an alignment needs before its first row.

Called by `workers/aligner.py` and `stages/align.py`.
"""

import re
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from fusion_ray.alignment.counts import PairCounts
from fusion_ray.alignment.fusechat_maps import row_map
from fusion_ray.alignment.maps import COUNTED_MAPS, MAPS
from fusion_ray.alignment.token_strings import UNKNOWN, TokenStrings
from fusion_ray.alignment.vocabulary import END_OF_TURN, Vocabulary
from fusion_ray.config import AlignConfig, ConfigError, ModelConfig
from fusion_ray.corpus.pieces import read_pieces
from fusion_ray.corpus.spans import end_of_turn_id
from fusion_ray.models import local_folder

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def check_supported(config: AlignConfig) -> None:
    """Raises ConfigError for settings that cannot run together."""
    if config.problem:
        raise ConfigError(config.problem)


def vocabulary_map(
    config: AlignConfig,
    pivot: Vocabulary,
    source: Vocabulary,
    strings: tuple[TokenStrings, TokenStrings] | None,
    counts: PairCounts | None,
) -> npt.NDArray[np.int32]:
    """(V of the source,) the map that `config` asks for. `strings` (pivot's, source's) are for the method `fusechat`, `counts` for `statistics`.

    Of `shares` it is the fallback, `canonical`; the shares themselves are `alignment/shares.py`'s. Equal vocabularies map to themselves. The
    published maps are extended by the end of turn, which goes to the pivot's whatever its string.
    """
    if source.same_as(pivot):
        return MAPS["exact"](source, pivot)
    if config.map in ("statistics", "shares") and counts is None:
        raise ValueError(
            f"map `{config.map}` needs the counts of the corpus: count every shard first, and give their sum"
        )
    if config.method == "fusechat":
        if strings is None:
            raise ValueError("method `fusechat` compares token strings: give those of both tokenizers")
        mapped = row_map(config.map, strings[1], strings[0], counts)
        for role, number in source.roles.items():
            if number in source.special and role in pivot.roles:
                mapped[number] = pivot.roles[role]
        return mapped
    if config.map in COUNTED_MAPS:
        return COUNTED_MAPS[config.map](source, pivot, counts or PairCounts.none())
    return MAPS["canonical" if config.map == "shares" else config.map](source, pivot)


@lru_cache(maxsize=4)  # a worker process aligns many shards of the same two models
def load_vocabulary(model: ModelConfig) -> Vocabulary:
    """The model's vocabulary, filled up to the rows of its embedding.

    Raises ValueError naming the model when its tokenizer has no byte-exact pieces, or its chat template no one end of turn.
    """
    return vocabulary_of(*_tokenizer_and_size(model))


@lru_cache(maxsize=4)
def load_strings(model: ModelConfig) -> TokenStrings:
    """The strings of the model's tokens, which the method `fusechat` compares; as many as `load_vocabulary` has pieces."""
    tokenizer, size = _tokenizer_and_size(model)
    return strings_of(tokenizer, vocab_size=size)


def _tokenizer_and_size(model: ModelConfig) -> tuple[PreTrainedTokenizerBase, int]:
    folder = local_folder(model.path, model.revision)
    trust = model.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    return tokenizer, int(config.get_text_config().vocab_size)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> Vocabulary:
    """The same of a tokenizer. The end of turn is the chat template's; a model without a template ends its texts there."""
    pieces = read_pieces(tokenizer, vocab_size)
    end = end_of_turn_id(tokenizer) if tokenizer.chat_template else tokenizer.eos_token_id
    fallback = {
        number
        for name, number in tokenizer.get_vocab().items()
        if _BYTE_TOKEN.fullmatch(name) and len(pieces.pieces[number]) == 1
    }
    roles = {} if end is None else {END_OF_TURN: int(end)}
    # Llama 2 puts its blank before a text that begins with one: " the" alone is written as " ", " the".
    doubles = b"".join(pieces.of(tokenizer.encode(" a", add_special_tokens=False))) == b"  a"
    return Vocabulary(
        tuple(pieces.pieces),
        frozenset(pieces.special),
        roles,
        frozenset(fallback),
        lambda text: _first_token(tokenizer, text[1:] if doubles and text.startswith(b" ") else text),
    )


def strings_of(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> TokenStrings:
    """The strings of a tokenizer, filled up with "" to `vocab_size`."""
    known = max(tokenizer.get_vocab().values(), default=-1) + 1
    padding = [""] * max(0, (vocab_size or 0) - known)
    pieces = tokenizer.convert_ids_to_tokens(list(range(known)))
    bos, eos, unk = (
        UNKNOWN if number is None else int(number)
        for number in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    )
    return TokenStrings(
        [*tokenizer.batch_decode([[number] for number in range(known)]), *padding],
        [*(piece or "" for piece in pieces), *padding],
        space_marker(tokenizer),
        bos,
        eos,
        unk,
    )


def space_marker(tokenizer: PreTrainedTokenizerBase) -> str:
    """How the tokenizer's pieces write a blank, by having it write some: what stands between two words. "" where nothing does."""
    for first, second in (("a", "b"), ("1", "2"), ("x", "y")):
        written = "".join(tokenizer.tokenize(f"{first} {second}"))
        found = re.fullmatch(f".*?{first}(.+){second}", written)
        if found:
            return found[1]
    return ""


def _first_token(tokenizer: PreTrainedTokenizerBase, text: bytes) -> int:
    """What the tokenizer begins `text` with; -1 for bytes that are no text of their own."""
    try:
        ids = tokenizer.encode(text.decode(), add_special_tokens=False)
    except UnicodeDecodeError:
        return -1
    return int(ids[0]) if ids else -1
