"""What an engine is started with: bounds from the vocabulary, the window and K, and the GPUs of its actor."""

import pytest

from fusion_ray.workers.engine_sizes import Shape, engine_sizes, gpu_share, merged, parallel, shape_of

LLAMA = {
    "vocab_size": 128_256,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 8192,
}
GPT2 = {"vocab_size": 50_257, "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}


def test_the_shape_is_read_under_every_family_s_names() -> None:
    assert shape_of(LLAMA.get) == Shape(128_256, 8192, 2 * 4 * 32 * 8 * 128)
    assert shape_of(GPT2.get) == Shape(50_257, 1024, 2 * 4 * 12 * 12 * 64)
    assert shape_of((LLAMA | {"head_dim": 64}).get).kv_bytes == 2 * 4 * 32 * 8 * 64
    with pytest.raises(KeyError, match="num_attention_heads"):
        shape_of({"vocab_size": 8}.get)


@pytest.mark.parametrize(
    ("vocabulary", "tokens"), [(1000, 8192), (32_000, 4194), (128_256, 1046), (1 << 20, 128), (1 << 24, 128)]
)
def test_tokens_a_step_shrink_as_the_vocabulary_grows(vocabulary: int, tokens: int) -> None:
    sizes = engine_sizes(Shape(vocabulary, 4096, 1000), top_k=10, max_length=2048, on_gpu=False)
    assert sizes.max_num_batched_tokens == tokens
    assert sizes.logits_bytes == tokens * vocabulary * 8
    assert sizes.max_model_len == 2049


@pytest.mark.parametrize(("top_k", "prompts"), [(10, 47), (4, 64), (128, 4)])
def test_prompts_a_call_shrink_as_k_grows(top_k: int, prompts: int) -> None:
    sizes = engine_sizes(Shape(32_000, None, 1000), top_k=top_k, max_length=20_479, on_gpu=False)
    assert sizes.prompts_a_call == prompts
    assert prompts * 20_480 * (top_k + 1) * 100 <= 1 << 30


def test_the_papers_settings_keep_their_batches() -> None:
    assert engine_sizes(Shape(32_000, 4096, 1), top_k=10, max_length=2048, on_gpu=True).prompts_a_call == 64


def test_what_is_given_stands_and_the_window_bounds() -> None:
    shape = Shape(32_000, 1024, 1_000_000)
    sizes = engine_sizes(shape, top_k=10, max_length=2048, on_gpu=False)
    assert (sizes.max_model_len, sizes.cache_bytes) == (1024, 8 * 1024 * 1_000_000)
    given = {"max_num_batched_tokens": 256, "kv_cache_memory_bytes": 7, "max_model_len": 512}
    sizes = engine_sizes(shape, top_k=10, max_length=2048, on_gpu=True, given=given)
    assert (sizes.max_num_batched_tokens, sizes.cache_bytes, sizes.max_model_len) == (256, 7, 512)
    assert engine_sizes(shape, top_k=10, max_length=2048, on_gpu=True).cache_bytes is None


def test_a_small_card_keeps_room_for_a_step_s_logits() -> None:
    assert gpu_share(1 << 30, 80 << 30) == 0.85
    assert gpu_share(1 << 30, 8 << 30) == pytest.approx(1 - 0.08 - 1 / 8)
    assert gpu_share(6 << 30, 8 << 30) == 0.5


def test_more_gpus_are_tensor_parallel_in_one_node() -> None:
    assert parallel(0, {}) == parallel(1, {}) == parallel(0.5, {}) == {}
    assert parallel(4, {}) == {"tensor_parallel_size": 4, "distributed_executor_backend": "mp"}
    assert parallel(4, {"pipeline_parallel_size": 2})["tensor_parallel_size"] == 2
    assert parallel(4, {"tensor_parallel_size": 4})["tensor_parallel_size"] == 4
    assert "distributed_executor_backend" not in parallel(2, {"distributed_executor_backend": "ray"})
    assert parallel(0, {"tensor_parallel_size": 2}) == {}  # on CPU: as many processes, no cards


def test_several_nodes_have_the_layers() -> None:
    both = {"tensor_parallel_size": 8, "pipeline_parallel_size": 2, "distributed_executor_backend": "ray"}
    assert parallel(8, {}, nodes=2) == both
    assert parallel(8, {"tensor_parallel_size": 4}, nodes=2)["pipeline_parallel_size"] == 4
    assert parallel(8, {"pipeline_parallel_size": 1}, nodes=2)["tensor_parallel_size"] == 16
    assert "distributed_executor_backend" not in parallel(8, {"distributed_executor_backend": "mp"}, nodes=2)
    with pytest.raises(ValueError, match=r"are 16 GPUs and the engine arguments want 15 \(tensor_parallel_size 5 x"):
        parallel(8, {"tensor_parallel_size": 5}, nodes=2)
    for gpus in (0, 0.5, 1.5):
        with pytest.raises(ValueError, match="give the whole number of GPUs that an engine has in each node"):
            parallel(gpus, {}, nodes=2)


@pytest.mark.parametrize(
    ("gpus", "given", "says"),
    [
        (1, {"tensor_parallel_size": 2}, "set resources.teach.gpus to 2"),
        (4, {"tensor_parallel_size": 8}, "resources.teach.gpus is 4 and the engine arguments want 8 GPUs"),
        (3, {"pipeline_parallel_size": 2}, "resources.teach.gpus is 3"),
        (1.5, {}, "must be a whole number"),
    ],
)
def test_another_number_of_gpus_is_told(gpus: float, given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parallel(gpus, given)


def test_an_argument_is_set_once() -> None:
    assert merged({"quantization": "fp8"}, {"max_num_seqs": 4}) == {"quantization": "fp8", "max_num_seqs": 4}
    with pytest.raises(ValueError, match=r"teach.engine.seed and resources.teach.engine.seed"):
        merged({"seed": 1}, {"seed": 2})
