"""One model in one process: rows through `teach_shard` into sealed Parquet, the same batches through the bare engine, and a transformers loop. Called by
`teach.py`; run as

    cd jobs/benchmarks; ../../.venv/bin/python -m teaching_speed.one_engine TASK      # TASK as JSON

The three take turns on the same rows with the same threads. The bare engine, with none of vLLM's code replaced (workers/prompt_arrays.py), gets prompts that
are tokenised already, in the batches that the teacher makes. The loop is the published way in its best form: rows that are tokenised already, padded in
batches of eight, forward, log-softmax, top-k, to numpy; it finds no bytes, checks nothing and stores nothing.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from vllm import TokensPrompt

from fusion_ray.corpus.shards import REJECTED, decode_conversations
from fusion_ray.store import Artifact, Store
from fusion_ray.workers.engine import Engine
from fusion_ray.workers.prompt_arrays import keep_arrays, put_back
from fusion_ray.workers.teach_shard import teach_shard
from fusion_ray.workers.teacher import Teacher

BATCH = 8


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    corpus = Artifact(task["corpus"], "corpus", "corpus")
    names = [unit.name for unit in corpus.manifest().units if unit.name != REJECTED]
    started = time.perf_counter()
    teacher = Teacher(task["model"], top_k=task["top_k"], max_length=task["max_length"], dtype="float32")
    ready = time.perf_counter() - started
    engine = teacher._engine
    assert isinstance(engine, Engine)
    prompts = []
    for name in names:
        rows = [engine.locate(each.messages) for each in decode_conversations(corpus.read_bytes(name))]
        prompts.append([row.ids.tolist() for row in rows if len(row.ids) <= engine.max_prompt])
    network = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32).eval()
    seconds: dict[str, list[float]] = {"teacher": [], "bare": [], "transformers": []}
    with tempfile.TemporaryDirectory(dir=task["work"]) as work:
        for number in range(task["repeats"] + 1):  # the first warms up
            out = Store(work).artifact("teach", 1, {"repeat": number}, {})
            for side, run in (
                ("teacher", lambda out=out: [teach_shard(teacher, corpus, out, name) for name in names]),
                ("bare", lambda: bare(engine, prompts)),
                ("transformers", lambda: transformers_loop(network, prompts, task["top_k"])),
            ):
                began = time.perf_counter()
                run()
                if number:
                    seconds[side].append(time.perf_counter() - began)
    tokens = sum(len(prompt) for shard in prompts for prompt in shard)
    print(json.dumps({"ready": ready, "tokens": tokens, "seconds": seconds}))


def bare(engine: Engine, shards: list[list[list[int]]]) -> None:
    """vLLM alone, in the teacher's own batches."""
    put_back()
    for prompts in shards:
        order = sorted(prompts, key=len)
        for first in range(0, len(order), engine._prompts_a_call):
            requests = [TokensPrompt(prompt_token_ids=ids) for ids in order[first : first + engine._prompts_a_call]]
            engine._llm.generate(requests, engine._greedy_logprobs, use_tqdm=False)
    keep_arrays()


@torch.no_grad()
def transformers_loop(network: torch.nn.Module, shards: list[list[list[int]]], top_k: int) -> None:
    for prompts in shards:
        for first in range(0, len(prompts), BATCH):
            batch = prompts[first : first + BATCH]
            width = max(map(len, batch))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
            logits = network(input_ids=ids, attention_mask=mask, use_cache=False).logits
            top = torch.log_softmax(logits.float(), -1).topk(top_k)
            top.values.half().numpy(), top.indices.int().numpy()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
