"""Whether two config.json mean one architecture: keys that are absent, or that another version of transformers calls otherwise, mean what they are loaded as.

transformers 5 writes rotary embeddings as `rope_parameters` where 4 wrote `rope_theta` and `rope_scaling`, and it leaves out what is the default. Called by the
gates.
"""

from collections.abc import Collection, Mapping

# A target that differs from the pivot in one of these computes something else with the same tensors.
KEYS = (
    "model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "hidden_activation", "tie_word_embeddings", "rms_norm_eps", "layer_norm_eps", "norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "rotary_pct", "partial_rotary_factor", "sliding_window", "attention_bias", "mlp_bias", "use_parallel_residual",
    "n_layer", "n_embd", "n_head", "num_layers", "layer_types",
    "num_experts", "num_local_experts", "num_experts_per_tok", "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar",
)  # fmt: skip
_THETA = 10000.0  # where no config says another
_UNSAID = object()  # null may differ from a default
_UNSAID_MAY_DIFFER = ("architectures",)  # a class for loading, which a config may leave open


def differing(
    pivot: Mapping[str, object], target: Mapping[str, object], *, but: Collection[str] = ()
) -> dict[str, tuple[object, object]]:
    """What the pivot and the target mean by the keys in which their architectures differ, except the keys `but`."""
    ours, theirs = plain(pivot), plain(target)
    keys = [
        key
        for key in KEYS
        if key not in but
        and ours.get(key, _UNSAID) != theirs.get(key, _UNSAID)
        and not (key in _UNSAID_MAY_DIFFER and None in (ours.get(key), theirs.get(key)))
    ]
    if keys and ours.get("model_type") == theirs.get("model_type"):
        both = _loaded(pivot), _loaded(target)
        ours, theirs = both if None not in both else (_filled(ours), _filled(theirs))  # type: ignore[assignment]  # None is excluded
    return {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}


def plain(config: Mapping[str, object]) -> dict[str, object]:
    """The config with `rope_theta` and `rope_scaling` (absent where nothing is scaled) in the place of one set of `rope_parameters`."""
    found = dict(config)
    rope = found.get("rope_parameters")
    if isinstance(rope, Mapping) and not any(isinstance(value, Mapping) for value in rope.values()):
        del found["rope_parameters"]
        moved = {key: value for key, value in rope.items() if key in ("rope_theta", "partial_rotary_factor")}
        found |= moved | {"rope_scaling": {key: value for key, value in rope.items() if key not in moved}}
    scaling = found.get("rope_scaling")
    if isinstance(scaling, Mapping):
        scaling = {"rope_type" if key == "type" else key: value for key, value in scaling.items()}
        is_default = scaling.get("rope_type", "default") == "default" and set(scaling) <= {"rope_type"}
        found["rope_scaling"] = None if is_default else scaling
    if found.get("rope_scaling", _UNSAID) is None:
        del found["rope_scaling"]
    return found


def _loaded(config: Mapping[str, object]) -> dict[str, object] | None:
    """The config as transformers loads it, defaults filled in; None where it knows no such model, or does not take it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # seconds, for configs that differ alone

    try:
        return plain(CONFIG_MAPPING[str(config.get("model_type"))].from_dict(dict(config)).to_dict())
    except Exception:  # each class checks in its own way; what it refuses is compared as it is written
        return None


def _filled(config: Mapping[str, object]) -> dict[str, object]:
    """With what families agree on where a key is absent."""
    found = dict(config)
    heads, hidden = found.get("num_attention_heads"), found.get("hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int) and heads:
        defaults: dict[str, object] = {"num_key_value_heads": heads, "head_dim": hidden // heads}
    else:
        defaults = {}
    for key, value in (defaults | {"rope_theta": _THETA, "attention_bias": False, "mlp_bias": False}).items():
        if found.get(key) is None:
            found[key] = value
    return found
