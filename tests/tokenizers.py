"""Real tokenizers that install with the lock, as fast tokenizers with a chat template each, for the alignment's proofs. Called by tests/unit/alignment.

`mistral_v1` and `mistral_v3` are Mistral's SentencePiece files with their two ways of adding a blank (as the published tokenizer.json of each does),
`tekken` is its byte-level file cut to the first ranks (as mistral_common itself cuts the file's 150k to 131k: seconds less for every test), the zoo's
five come with the package, `gpt2` is trained here in GPT-2's manner. What is slow to make is made once a process.
"""

import json
import tempfile
from functools import cache
from pathlib import Path
from shutil import copy

import mistral_common
from sentencepiece import SentencePieceProcessor
from tokenizers import normalizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase
from transformers.integrations.mistral import convert_tekken_tokenizer
from transformers.tokenization_utils_base import generate_merges

from fusion_ray.alignment.vocabulary import Vocabulary
from fusion_ray.corpus.spans import Locator
from fusion_ray.workers.align_setup import vocabulary_of
from fusion_ray.zoo.catalogue import ZOO_MODELS
from tests.tiny import make_tokenizer

MISTRAL_DATA = Path(mistral_common.__file__).parent / "data"
SENTENCEPIECE = {"mistral_v1": "tokenizer.model.v1", "mistral_v3": "mistral_instruct_tokenizer_240323.model.v3"}
TEKKEN = "tekken_240718.json"  # tekken_240911.json has the same vocabulary and says how images are read
TEKKEN_SIZE = 32_768
ZOO = tuple(ZOO_MODELS)
NAMES = (*SENTENCEPIECE, "tekken", *ZOO, "gpt2")

_TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}USER{% else %}ASSISTANT{% endif %}{% endfor %}"
)
TEMPLATES = {
    "mistral_v1": _TURNS.replace("USER", "{{ '[INST] ' + m['content'] + ' [/INST]' }}").replace(
        "ASSISTANT", "{{ ' ' + m['content'] + eos_token }}"
    ),
    "mistral_v3": _TURNS.replace("USER", "{{ '[INST] ' + m['content'] + '[/INST]' }}").replace(
        "ASSISTANT", "{{ ' ' + m['content'] + eos_token }}"
    ),
    "tekken": _TURNS.replace("USER", "{{ '[INST]' + m['content'] + '[/INST]' }}").replace(
        "ASSISTANT", "{{ m['content'] + eos_token }}"
    ),
}


@cache
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    if name in SENTENCEPIECE:
        return _sentencepiece(name)
    if name == "tekken":
        return _tekken(name)
    if name in ZOO:
        return AutoTokenizer.from_pretrained(ZOO_MODELS[name].path)
    return make_tokenizer("bytelevel", template="chatml", vocab_size=900)


@cache
def vocabulary(name: str) -> Vocabulary:
    return vocabulary_of(tokenizer(name))


@cache
def locator(name: str) -> Locator:
    return Locator(tokenizer(name), name=name)


def sentencepiece_model(name: str) -> SentencePieceProcessor:
    """The model file's own encoder, to hold the conversion against."""
    return SentencePieceProcessor(model_file=str(MISTRAL_DATA / SENTENCEPIECE[name]))


def _sentencepiece(name: str) -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory() as folder:
        copy(MISTRAL_DATA / SENTENCEPIECE[name], Path(folder) / "tokenizer.model")
        added = LlamaTokenizer.from_pretrained(folder).added_tokens_decoder
    model = sentencepiece_model(name)
    pieces = {model.id_to_piece(number): number for number in range(model.vocab_size())}
    # transformers orders the merges by id, which writes "  and" in another way than the model does
    scores = {piece: model.get_score(number) for piece, number in pieces.items()}
    made = LlamaTokenizer(vocab=pieces, merges=generate_merges(pieces, scores), chat_template=TEMPLATES[name])
    made.add_tokens([token for _, token in sorted(added.items())])
    if name == "mistral_v1":
        backend = made.backend_tokenizer
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    return made


def _tekken(name: str) -> PreTrainedTokenizerBase:
    content = json.loads((MISTRAL_DATA / TEKKEN).read_text())
    content["config"]["default_vocab_size"] = TEKKEN_SIZE
    content["vocab"] = content["vocab"][:TEKKEN_SIZE]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tekken.json"
        file.write_text(json.dumps(content))
        return convert_tekken_tokenizer(str(file), chat_template=TEMPLATES[name])
