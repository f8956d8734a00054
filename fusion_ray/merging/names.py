"""What a tensor's name says: the decoder layer it belongs to, and what it is within it. Called by `varm.py`, the merge report and the recipes of merges."""

import re

_LAYER = re.compile(r"^((?:[^.]+\.)*?(\d+))\.(.+)$")
_STACK = re.compile(r"^((?:[^.]+\.)*?(?:layers|layer|h|blocks|block))\.(\d+)\.(.+)$")
_INPUT = re.compile(r"(^|\.)(wte|wpe|project_in)\.|embed(?!_out)")


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """`model.layers.3.mlp.up_proj.weight` is of layer 3 and kind `mlp.up_proj.weight`; outside the layers: None and the whole name."""
    layer = _LAYER.match(name)
    return (int(layer[2]), layer[3]) if layer else (None, name)


def unit_of(name: str, granularity: str) -> str:
    """The unit that shares its weights with this tensor: itself, its decoder layer (a tensor outside is its own), or the model. Raises ValueError for an
    unknown granularity."""
    if granularity == "model":
        return ""
    if granularity == "layer":
        layer = _LAYER.match(name)
        return layer[1] if layer else name
    if granularity == "matrix":
        return name
    raise ValueError(f"granularity {granularity!r}: give parameter, matrix, layer or model")


def in_stack(name: str) -> tuple[str, int, str] | None:
    """`model.layers.3.mlp.up_proj.weight` is (`model.layers`, 3, `mlp.up_proj.weight`); likewise `h`, `block` and `blocks`. None outside of such a stack."""
    found = _STACK.match(name)
    return (found[1], int(found[2]), found[3]) if found else None


def comes_before_layers(name: str) -> bool:
    """Of a tensor outside the layers: True for embeddings (of tokens and of positions, with their norm), False for the last norm and the head."""
    return _INPUT.search(name) is not None
