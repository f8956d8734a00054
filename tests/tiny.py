"""Tiny random-weight chat models of real families, with a trained tokenizer and a chat template, for tests that need a real model folder.

`make_tiny_model` writes a Hugging Face folder (hidden 128, 4 heads of 32, 2 layers, float32 safetensors) that transformers and vLLM on CPU both load
in seconds. Called by tests of every part; nothing under `fusion_ray/` imports it.
"""

import itertools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Write a short poem about the rain in spring; keep it simple and clear.",
    "If a train leaves at 9:45 and travels 120 kilometres in 2 hours, how fast does it go?",
    "Paris is the capital of France, Berlin is the capital of Germany, Rome is the capital of Italy.",
    "def add(first, second):\n    return first + second\n\nprint(add(12, 30))\n",
    "You are a helpful assistant. Answer the question of the user in one sentence.",
    "Water boils at one hundred degrees; it freezes at zero degrees.",
    "First read the question, then think about the answer, then write it down step by step.",
    "Das Wetter ist heute schön, die Straße ist naß. Où est la gare, s'il vous plaît ?",
    "The answer is 42. The sum of 17 and 25 is 42. The product of 6 and 7 is 42.",
    "List three animals: a cat, a dog and a horse. List three colours: red, green and blue.",
    "What is your name? My name is not important. Where do you come from? I come from here.",
)

# Each ends a turn with one special token; `strip` strips the contents and `nosystem` refuses a system message, as real ones do.
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "strip": "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}",
    "nosystem": "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}",
    "inst": "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '<|im_end|>' }}"
    "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}",
}
SPECIAL = ("<unk>", "<s>", "<|pad|>", "<|im_start|>", "<|im_end|>")
FAMILIES = ("llama", "qwen2", "qwen3", "gpt_neox", "mistral", "gemma", "gemma2", "phi3", "gpt2")


def make_tokenizer(
    kind: str = "bytelevel", *, template: str | None = "chatml", vocab_size: int = 600
) -> PreTrainedTokenizerFast:
    """A tokenizer trained on SENTENCES: `bytelevel` (GPT-2's manner), `sentencepiece` (spaces are U+2581, a dummy prefix space, byte fallback,
    as Llama 2) or `sentencepiece-noprefix` (without the dummy prefix, as Gemma). `template` is a name of TEMPLATES, a Jinja text, or None.
    """
    if kind == "bytelevel":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.train_from_iterator(
            SENTENCES,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
    elif kind in ("sentencepiece", "sentencepiece-noprefix"):
        core = _sentencepiece(vocab_size, dummy_prefix=kind == "sentencepiece")
    else:
        raise ValueError(f"no tokenizer kind {kind!r}: bytelevel, sentencepiece or sentencepiece-noprefix")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        unk_token="<unk>",
        chat_template=TEMPLATES.get(template, template) if template else None,
        clean_up_tokenization_spaces=False,
    )


def _sentencepiece(vocab_size: int, *, dummy_prefix: bool) -> Tokenizer:
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=vocab_size - 261, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    head = [*SPECIAL, *(f"<0x{value:02X}>" for value in range(256))]
    pieces = head + sorted(state["vocab"], key=state["vocab"].get)
    ids = {piece: number for number, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in state["merges"]]
    core = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if dummy_prefix else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tail = [decoders.Strip(content=" ", left=1)] if dummy_prefix else []
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return core


def make_tiny_model(
    folder: str | Path,
    family: str = "llama",
    tokenizer: str = "bytelevel",
    template: str | None = "chatml",
    seed: int = 0,
    *,
    dtype: str = "float32",
    max_positions: int = 512,
) -> Path:
    """Write a random-weight model of `family` (one of FAMILIES) with its tokenizer to `folder` and return the folder.

    The vocabulary is padded to a multiple of 64, as most real ones are, so the last ids have no token. AutoTokenizer (transformers 5) gives every qwen2
    folder Qwen2's own normaliser and word split whatever its tokenizer.json says: take another family for a sentencepiece tokenizer.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tok = make_tokenizer(tokenizer, template=template)
    vocab = -(-(len(tok) + 1) // 64) * 64
    shape: dict[str, object] = {
        "vocab_size": vocab,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
    }
    if family == "gpt2":
        shape |= {"n_embd": 128, "n_head": 4, "n_layer": 2, "n_positions": max_positions}
    else:
        shape |= {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": max_positions,
            "tie_word_embeddings": family.startswith("gemma"),
        }
    if family not in ("gpt2", "gpt_neox"):
        shape |= {"num_key_value_heads": 2}
    if family in ("gemma", "gemma2", "qwen3"):
        shape |= {"head_dim": 32}
    if family == "gemma2":
        shape |= {"query_pre_attn_scalar": 32, "sliding_window": max_positions}
    if family == "mistral":
        shape |= {"sliding_window": None}
    if family not in FAMILIES:
        raise ValueError(f"no family {family!r}: one of {', '.join(FAMILIES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape), dtype=torch.float32)
        # The default init of 0.02 makes almost uniform logits: larger weights give distributions with a clear order.
        for parameter in itertools.chain(model.parameters()):
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.15)
    model.to(getattr(torch, dtype)).save_pretrained(folder, safe_serialization=True)
    tok.save_pretrained(folder)
    return folder
