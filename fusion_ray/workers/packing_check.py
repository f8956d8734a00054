"""Whether a model can read packed lines: proven on a few made-up conversations before the first step. Called by workers/trainer.py.

No attention mask is passed and no cache kept, so transformers' masks (masking_utils.find_packed_sequence_indices; sdpa and eager attention) take each
restart of `position_ids` for a border, and count a sliding window within a conversation. What passes those masks by - recurrent and convolutional layers,
ALiBi, models that do not hand the position ids to the mask (Falcon) - shows here in the logprobs, whatever the family is called.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fusion_ray.workers.student import Student

LINES = ((9, 7, 12), (6, 8))  # tokens of the made-up conversations
CHANGED = ((0, 1), (1, 0))  # line and place of those whose tokens a second reading exchanges
KEPT = (0, 2, 4)  # the others, numbered through all lines
# How much of what open borders change may be rounding: packed and padded batches are computed by different kernels.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
COARSE_ROUNDING = 0.1


@torch.no_grad()
def check_packing(student: Student, device: torch.device, *, max_length: int) -> None:
    """Raises ValueError, naming the model, where a conversation in a line is not read as it is alone, or reads its neighbours."""
    name = type(student.model).__name__
    arguments = inspect.signature(student.model.base_model.forward).parameters.values()
    if not any(one.name == "position_ids" or one.kind is inspect.Parameter.VAR_KEYWORD for one in arguments):
        raise ValueError(_refusal(name, "it takes no position ids, which tell where a conversation begins"))
    for kind, limit in _moving_ropes(student.model.config.get_text_config()):
        if max_length > limit:
            raise ValueError(
                f"distill.packing: the {kind} position encoding of {name} depends on the longest conversation beside a token from {limit} tokens on, "
                f"and distill.max_length is {max_length}: set distill.max_length to {limit} or less, or distill.packing: false"
            )
    vocabulary = student.model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randint(vocabulary, (8,), generator=generator)  # any ids, the same for every position
    texts = [[torch.randint(vocabulary, (size,), generator=generator) for size in line] for line in LINES]
    exchanged = [list(line) for line in texts]
    for line, place in CHANGED:
        exchanged[line][place] = torch.randint(vocabulary, (LINES[line][place],), generator=generator)
    alone = _logprobs(student, [[text] for line in texts for text in line], wanted, device)
    packed = _logprobs(student, texts, wanted, device)
    among_others = _logprobs(student, exchanged, wanted, device)
    unbounded = _logprobs(student, texts, wanted, device, borders=False)
    every = range(len(alone))
    rounding = ROUNDING.get(next(student.parameters()).dtype, COARSE_ROUNDING)
    allowed = 1e-5 + rounding * _difference(unbounded, alone, every)
    if not _difference(packed, among_others, KEPT) <= allowed:
        raise ValueError(_refusal(name, "other tokens in one change the logprobs of another"))
    if not _difference(packed, alone, every) <= allowed:
        raise ValueError(_refusal(name, "its logprobs there are not those that it has alone"))


def _logprobs(
    student: Student, lines: Sequence[Sequence[Tensor]], wanted: Tensor, device: torch.device, *, borders: bool = True
) -> list[Tensor]:
    """The logprobs (T, J) of the `wanted` ids (J,) after every token of each conversation, in the order of the lines."""
    width = max(sum(map(len, line)) for line in lines)
    ids = torch.zeros((len(lines), width), dtype=torch.int64)
    position_ids = torch.zeros_like(ids)
    places = []
    for b, line in enumerate(lines):
        begin = 0
        for text in line:
            ids[b, begin : begin + len(text)] = text
            position_ids[b, begin : begin + len(text)] = torch.arange(len(text))
            places.append(slice(b * width + begin, b * width + begin + len(text)))
            begin += len(text)
    every = torch.arange(ids.numel(), device=device)
    head_ids = wanted.to(device).expand(ids.numel(), -1)
    picked, logsumexp = student.picked(ids.to(device), every, head_ids, position_ids.to(device) if borders else None)
    logprobs = (picked - logsumexp[:, None]).cpu()  # (B * T, J)
    return [logprobs[place] for place in places]


def _difference(first: Sequence[Tensor], second: Sequence[Tensor], numbers: Sequence[int]) -> float:
    return max(float((first[number] - second[number]).abs().max()) for number in numbers)


def _moving_ropes(config: object) -> Iterator[tuple[str, int]]:
    """The rotary encodings of a model that change with the longest conversation of a batch, and the tokens from which on they do."""
    ropes: object = getattr(config, "rope_parameters", None) or {}
    longest = int(getattr(config, "max_position_embeddings", 0))
    if not isinstance(ropes, Mapping):
        return
    for rope in (ropes, *ropes.values()):  # one for all layers, or one for each type of layer
        kind = rope.get("rope_type") if isinstance(rope, Mapping) else None
        if kind == "longrope":
            yield kind, int(rope.get("original_max_position_embeddings") or longest)
        elif kind is not None and "dynamic" in kind:
            yield kind, longest


def _refusal(name: str, why: str) -> str:
    return f"distill.packing: {name} cannot keep conversations in one line apart: {why}. Set distill.packing: false"
