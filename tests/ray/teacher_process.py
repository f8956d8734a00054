"""Run by test_teacher.py in a process of its own, as vLLM changes the process it is loaded into: python teacher_process.py FOLDER.

FOLDER/models.json names model folders; FOLDER/<name>.parquet and FOLDER/results.json are what came out.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from fusion_ray.logprobs.codec import encode
from fusion_ray.records import Conversation, Message
from fusion_ray.workers.chat import ChatModel
from fusion_ray.workers.prompt_arrays import keep_arrays, put_back
from fusion_ray.workers.teacher import Teacher
from tests.tiny import SENTENCES

TOP_K = {"llama": 6, "qwen2": 6, "gemma": 128, "broken": 6}
QUESTIONS = [["What is it?", "And why?"], ["Say one word."]]


def conversations() -> list[Conversation]:
    found = []
    for number in range(20):
        first, second = SENTENCES[number % 12], SENTENCES[(5 * number + 1) % 12]
        turns = [
            ("user", f"{number}: {first}"),
            ("assistant", second),
            ("user", "Then?"),
            ("assistant", f"  {first} é漢 "),
        ]
        found.append(Conversation(f"row-{number}", tuple(Message(role, content) for role, content in turns)))
    late = [Message("user", " ".join(SENTENCES)), Message("assistant", "Too late.")]
    # Of the assistant turns of "long" the first two fit, and the third begins before the longest prompt ends.
    short = (Message("user", "Go on."), Message("assistant", "So be it."))
    last = (Message("user", "Go on."), Message("assistant", " ".join(SENTENCES)))
    return [*found, Conversation("late", tuple(late)), Conversation("long", (*short, *short, *last, *short))]


def main(folder: Path) -> None:
    results: dict[str, object] = {}
    rows = conversations()
    for name, path in json.loads((folder / "models.json").read_text()).items():
        teacher = Teacher(path, top_k=TOP_K[name], max_length=150, dtype="float32", name=name)
        first = teacher.teach(rows)
        (folder / f"{name}.parquet").write_bytes(encode(first.table))
        teacher.teach(rows[3:9])
        told: list[list[str]] = []
        again = teacher.teach(rows)
        put_back()
        from_lists = teacher.teach(rows)
        arrays = keep_arrays()
        alone = teacher.teach(rows, alone={"row-3"}, quarantined={"row-4"}, starting=told.append)
        chat = ChatModel(path, max_length=200, dtype="float32", name=name)
        results[name] = {
            "counts": asdict(first.counts),
            "missing": [asdict(row) for row in first.rejected],
            "same_again": encode(again.table) == encode(first.table),
            "same_from_lists": arrays and encode(from_lists.table) == encode(first.table),
            "alone": {"told": told, "counts": asdict(alone.counts), "missing": [row.reason for row in alone.rejected]},
            "answers": chat.answer(QUESTIONS, max_tokens=8),
            "bits": chat.bits_per_byte(rows[:20]),
            "version": teacher.version,
        }
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
