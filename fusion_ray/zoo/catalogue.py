"""The zoo's models: their names, families, folders, tokenizers and strong skills. Imports no torch, so that `--help` may list them."""

from dataclasses import dataclass
from pathlib import Path

ZOO = Path(__file__).parent
DATA = ZOO / "data"
MODELS = ZOO / "models"

CORPUS = DATA / "corpus.jsonl"
VALIDATION = DATA / "validation.jsonl"
HELDOUT = DATA / "heldout.jsonl"
QUESTIONS = DATA / "questions.jsonl"
VALIDATION_QUESTIONS = DATA / "validation_questions.jsonl"

SKILL_NAMES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
MAX_LENGTH = 512


@dataclass(frozen=True)
class ZooModel:
    """One model of the zoo.

    tokenizer: `byte_bpe` (byte-level BPE), `sentencepiece_bpe` or `sentencepiece_unigram` (space markers and byte fallback).
    vocabulary: entries the tokenizer is trained to, its special tokens included.
    template: a key of `templates.TEMPLATES`.
    strong: the skills that it is trained on in earnest; empty for the pivot, which sees a little of all.
    """

    name: str
    family: str
    tokenizer: str
    vocabulary: int
    split_digits: bool
    template: str
    strong: tuple[str, ...]

    @property
    def path(self) -> Path:
        return MODELS / self.name


PIVOT = ZooModel("pivot", "llama", "byte_bpe", 1024, True, "chatml", ())
SOURCES = (
    ZooModel("source_qwen3", "qwen3", "byte_bpe", 1280, False, "headers", ("reasoning", "math", "coding")),
    ZooModel("source_neox", "gpt_neox", "byte_bpe", 1600, False, "zephyr", ("writing", "roleplay", "extraction")),
    ZooModel("source_mistral", "mistral", "sentencepiece_bpe", 1200, True, "markdown", ("stem", "humanities")),
)
FOURTH = ZooModel("source_gemma", "gemma", "sentencepiece_unigram", 1400, True, "turns", ("roleplay", "coding", "stem"))
ZOO_MODELS = {model.name: model for model in (PIVOT, *SOURCES, FOURTH)}
