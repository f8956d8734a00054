"""One chat model as a batch worker of evaluate: greedy answers over several turns, and the bits per byte of held-out conversations."""

from collections.abc import Sequence

from fusion_ray.config import EngineArgs
from fusion_ray.corpus.spans import end_of_turn_id
from fusion_ray.records import Conversation, Message
from fusion_ray.workers.engine import ENGINE, Engine
from fusion_ray.workers.teacher import label_bits


class ChatModel:
    """vLLM on a local model folder with the model's own chat template. Raises ValueError as Engine does."""

    version = ENGINE

    def __init__(
        self,
        model_folder: str,
        *,
        max_length: int = 2048,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        seed: int = 0,
        engine: EngineArgs | None = None,
        name: str = "",
    ) -> None:
        self._engine = Engine(
            model_folder,
            max_length=max_length,
            top_k=1,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            seed=seed,
            engine=engine,
            name=name,
        )
        tokenizer = self._engine.tokenizer
        ends = {end_of_turn_id(tokenizer), tokenizer.eos_token_id}
        self._stop = sorted(token for token in ends if token is not None)

    def answer(self, questions: Sequence[Sequence[str]], *, max_tokens: int) -> list[list[str]]:
        """Answers to the turns of each question, likeliest token first, the model's own earlier answers kept in the context.

        Raises ValueError naming the question whose conversation leaves no room for an answer in the model's window.
        """
        answers: list[list[str]] = [[] for _ in questions]
        for turn in range(max(map(len, questions), default=0)):
            asked = [number for number, turns in enumerate(questions) if turn < len(turns)]
            prompts = [self._engine.locator.prompt(_so_far(questions[number], answers[number])) for number in asked]
            for number, prompt in zip(asked, prompts, strict=True):
                if len(prompt) > self._engine.max_prompt:
                    raise ValueError(
                        f"turn {turn + 1} of question {number + 1} has {len(prompt)} tokens with its context, {self._engine.name} takes "
                        f"{self._engine.max_prompt}: shorten the question or lower evaluate.max_tokens"
                    )
            for number, ids in zip(
                asked, self._engine.greedy(prompts, max_tokens=max_tokens, stop=self._stop), strict=True
            ):
                answers[number].append(self._engine.tokenizer.decode(ids, skip_special_tokens=True).strip())
        return answers

    def bits_per_byte(self, conversations: Sequence[Conversation]) -> tuple[float, int]:
        """(bits, bytes): what the assistant bytes of the conversations cost in all, and how many they are; long rows are cut at a token.

        Raises corpus.template.UnlocatedError for a conversation that the template refuses or whose text is not located.
        """
        rows = [
            self._engine.locate(conversation.messages).cut(self._engine.max_prompt) for conversation in conversations
        ]
        answers = self._engine.prompt_logprobs([row.ids.tolist() for row in rows])
        bits = sum(label_bits(row, top.at(row.position)) for row, top in zip(rows, answers, strict=True))
        return bits, sum(row.bytes for row in rows)

    def close(self) -> None:
        """Frees the engine's memory; the model answers no more."""
        self._engine.close()


def _so_far(turns: Sequence[str], answers: Sequence[str]) -> list[Message]:
    """The conversation up to the turn that is asked next."""
    messages = []
    for question, answer in zip(turns, answers, strict=False):
        messages += [Message("user", question), Message("assistant", answer)]
    return [*messages, Message("user", turns[len(answers)])]
