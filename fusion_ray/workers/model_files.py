"""The tokenizer and the sizes in a local model folder. Called by workers/engine.py and workers/endpoint.py; imports no vLLM."""

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from fusion_ray.workers.engine_sizes import Shape, shape_of


def load_tokenizer(folder: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in a local model folder. Raises ValueError naming the folder."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the tokenizer of {folder} cannot be loaded: {error}") from error


def read_shape(folder: str, *, trust_remote_code: bool) -> Shape:
    """Raises ValueError naming the folder where its config.json is missing or of an unknown model."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
        return shape_of(lambda name: getattr(config, name, None))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the config of {folder} cannot be loaded: {error}") from error


def check_top_k(top_k: int, shape: Shape, name: str) -> None:
    if top_k > shape.vocabulary:
        raise ValueError(
            f"teach.top_k is {top_k}, the vocabulary of {name} has {shape.vocabulary} tokens: lower teach.top_k"
        )
