"""Does a merged model speak at all? One forward pass over a prompt, on the processor. Called by the command `merge` after it has written the folder.

What it finds are merges that are whole on disk and broken as models: non-finite values, an output that is the same whatever is read, an output that is
flat. It does not judge how good the model is.
"""

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fusion_ray.checkpoints.errors import MergeError
from fusion_ray.checkpoints.reader import open_checkpoint

PROMPT = "What is the capital of France?"
FLAT = 1e-4  # standard deviation of the logits over the vocabulary


def check_model(folder: str) -> str:
    """A line that says what was seen. Raises MergeError, saying what is wrong, for a model that cannot be used; the folder is left as it is."""
    merged = open_checkpoint(folder, model="the merged model")
    size, free = merged.bytes, _free_memory()
    if size > 0.8 * free:
        return f"not checked: the model of {size / 1e9:.1f} GB does not fit the {free / 1e9:.1f} GB of memory that are free"
    try:
        # Code that comes with a model is not run, and transformers asks nobody whether it may.
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        if "auto_map" in merged.config:
            return "not checked: the model comes with code of its own, which is not run"
        raise MergeError(
            f"{folder} was written and does not load as a causal language model ({error}); look at its config.json, or merge with --no-check"
        ) from error
    ids = _prompt_ids(folder, model)
    problem = _what_is_missing(sorted(loaded["missing_keys"])) or _what_is_foreign(ids, model)
    if not problem:
        with torch.inference_mode():
            logits = model.eval()(input_ids=torch.tensor([ids])).logits[0].float()
        problem = what_is_wrong(logits)
    if problem:
        raise MergeError(
            f"{folder} was written, but as a model it is broken: {problem}. Look at merge_report.json (weights, share of parameters moved) and at the "
            "settings of the merge; the files are kept"
        )
    best = int(logits[-1].argmax())
    return f"checked: finite logits, next token {best} after a prompt of {len(ids)} tokens (probability {float(logits[-1].softmax(0)[best]):.3f})"


def _what_is_missing(names: Sequence[str]) -> str | None:
    """transformers fills tensors that it does not find with random numbers."""
    if not names:
        return None
    return f"its config.json asks for the tensor {names[0]!r} ({len(names)} such in all), which no file holds"


def _what_is_foreign(ids: Sequence[int], model: PreTrainedModel) -> str | None:
    rows = _rows(model)
    if max(ids) < rows:
        return None
    return f"its tokenizer gives the prompt the id {max(ids)}, and its embeddings have {rows} rows: it is another model's tokenizer"


def what_is_wrong(logits: torch.Tensor) -> str | None:
    """Of the logits (T, V) of a prompt; None where nothing is."""
    if not bool(torch.isfinite(logits).all()):
        return "its logits hold NaN or infinite values"
    if bool((logits.std(dim=-1) < FLAT).any()):
        return "its logits are the same for every token of the vocabulary"
    if logits.shape[0] > 1 and float((logits - logits[0]).abs().max()) < FLAT:
        return "its logits are the same whatever it has read"
    return None


def _prompt_ids(folder: str, model: PreTrainedModel) -> list[int]:
    """The prompt's ids, or some ids of the vocabulary where the folder has no tokenizer that loads."""
    try:
        ids = list(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).encode(PROMPT))
    except (ValueError, KeyError, OSError, TypeError):
        ids = []
    return ids if len(ids) > 1 else [number * 7 % _rows(model) for number in range(1, 9)]


def _rows(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _free_memory() -> int:
    """What can be had without swapping: also what now holds pages of files, which after a merge is most of it."""
    with open("/proc/meminfo") as file:
        found = next(line for line in file if line.startswith("MemAvailable:"))
    return int(found.split()[1]) * 1024
