"""The vocabularies of two models, which an alignment needs before its first row. Called by `workers/aligner.py` and `stages/align.py`."""

import re
from functools import lru_cache

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from fusion_ray.alignment.maps import MAPS
from fusion_ray.alignment.methods import METHODS
from fusion_ray.alignment.vocabulary import END_OF_TURN, Vocabulary
from fusion_ray.config import AlignConfig, ConfigError, ModelConfig
from fusion_ray.corpus.pieces import read_pieces
from fusion_ray.corpus.spans import end_of_turn_id
from fusion_ray.models import local_folder

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def check_supported(config: AlignConfig) -> None:
    """Raises ConfigError for a method or a map that cannot run."""
    for key, value, known in (("method", config.method, METHODS), ("map", config.map, MAPS)):
        if value not in known:
            raise ConfigError(
                f"align.{key} is {value!r}, which is not there yet; set align.{key} to {' or '.join(known)}"
            )


@lru_cache(maxsize=4)  # a worker process aligns many shards of the same two models
def load_vocabulary(model: ModelConfig) -> Vocabulary:
    """The model's vocabulary, filled up to the rows of its embedding.

    Raises ValueError naming the model when its tokenizer has no byte-exact pieces, or its chat template no one end of turn.
    """
    folder = local_folder(model.path, model.revision)
    trust = model.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    return vocabulary_of(tokenizer, vocab_size=int(config.get_text_config().vocab_size))


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None) -> Vocabulary:
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


def _first_token(tokenizer: PreTrainedTokenizerBase, text: bytes) -> int:
    """What the tokenizer begins `text` with; -1 for bytes that are no text of their own."""
    try:
        ids = tokenizer.encode(text.decode(), add_special_tokens=False)
    except UnicodeDecodeError:
        return -1
    return int(ids[0]) if ids else -1
