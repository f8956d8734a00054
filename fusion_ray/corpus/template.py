"""Chat templates: a conversation rendered by a model's own template, and where each message's content lies in the rendering, by proof.

The template is rendered once per sequence of roles with placeholders for contents, which gives the text around them; a second rendering whose
placeholders carry white space shows which contents the template strips. A real rendering must equal those texts with the real contents put in, or the row
is refused: nothing is ever searched for in the text. Called by spans.py.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from fusion_ray.records import Message

# What templates do to a content; told apart by a probe with "\n " before and " \n" after the placeholder.
STRIPS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: text.strip(),
    lambda text: text.rstrip(),
    lambda text: text.lstrip(),
    lambda text: text.strip("\n"),
    lambda text: text.rstrip("\n"),
    lambda text: text.lstrip("\n"),
)


class UnlocatedError(ValueError):
    """A conversation that a template refuses or whose contents cannot be located in its rendering; the message is the reason."""


@dataclass(frozen=True)
class Placed:
    """One content in the rendered text: characters [start, end) are `content[skipped : skipped + end - start]` of message `message`."""

    message: int
    start: int
    end: int
    skipped: int


@dataclass(frozen=True)
class _Skeleton:
    """The rendering of a sequence of roles: literals[0], content of order[0], literals[1], ... with what each content goes through."""

    literals: tuple[str, ...]
    order: tuple[int, ...]
    strips: tuple[int, ...]


class ChatTemplate:
    """The chat template of one tokenizer. Raises ValueError naming the model when it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer of {name} has no chat template: add chat_template.jinja to the model folder, "
                "or set corpus.template: pivot to render every model's rows with the pivot's"
            )
        self._tokenizer = tokenizer
        self._name = name
        self._skeletons: dict[tuple[str, ...], _Skeleton | UnlocatedError] = {}

    def render(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        """The text of a conversation; `generation` adds the start of the assistant's next turn. Raises UnlocatedError with the template's reason."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
        except TemplateError as error:
            raise UnlocatedError(f"the chat template of {self._name} refuses the conversation: {error}") from error
        except Exception as error:  # what a template's own expressions raise, a TypeError for one
            raise UnlocatedError(
                f"the chat template of {self._name} fails on the conversation: {type(error).__name__}: {error}"
            ) from error

    def locate(self, messages: Sequence[Message]) -> tuple[str, list[Placed]]:
        """The rendered text and the place of every content in it, in text order. Raises UnlocatedError."""
        text = self.render(messages)
        skeleton = self._skeleton(tuple(message.role for message in messages))
        parts, places, at = [skeleton.literals[0]], [], len(skeleton.literals[0])
        for number, strip, literal in zip(skeleton.order, skeleton.strips, skeleton.literals[1:], strict=True):
            content = messages[number].content
            kept = STRIPS[strip](content)
            places.append(Placed(number, at, at + len(kept), content.find(kept)))
            parts += (kept, literal)
            at += len(kept) + len(literal)
        if "".join(parts) != text:
            raise UnlocatedError(
                f"the text cannot be located in the rendering of {self._name}: its chat template changes the contents of this conversation"
            )
        return text, places

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton:
        found = self._skeletons.get(roles)
        if found is None:
            try:
                found = self._probe(roles)
            except UnlocatedError as error:
                found = error
            self._skeletons[roles] = found
        if isinstance(found, UnlocatedError):
            raise UnlocatedError(str(found))
        return found

    def _probe(self, roles: tuple[str, ...]) -> _Skeleton:
        names = [f"xPLACE{number}HOLDERx" for number in range(len(roles))]
        plain = self.render([Message(role, name) for role, name in zip(roles, names, strict=True)])
        pieces = re.split("xPLACE([0-9]+)HOLDERx", plain)
        literals, order = tuple(pieces[0::2]), tuple(int(number) for number in pieces[1::2])
        for number, role in enumerate(roles):
            if role == "assistant" and order.count(number) != 1:
                raise UnlocatedError(
                    f"the chat template of {self._name} shows message {number} (assistant) {order.count(number)} times, expected once"
                )
        spaced = [f"\n {name} \n" for name in names]
        rendered = self.render([Message(role, content) for role, content in zip(roles, spaced, strict=True)])
        strips = _match(rendered, literals, [spaced[number] for number in order])
        if strips is None:
            raise UnlocatedError(f"the chat template of {self._name} changes white space in a way that is not known")
        return _Skeleton(literals, order, tuple(strips))


def _match(text: str, literals: Sequence[str], contents: Sequence[str]) -> list[int] | None:
    """Which of STRIPS each content went through so that literals and contents make `text`; None when none does."""

    # A walk with its own stack: a conversation may have more messages than Python's has room for.
    chosen: list[int] = []
    starts: list[int] = []  # of the contents in the text
    at, number, index = 0, 0, 0
    while True:
        if index == 0:  # nothing was tried at this content yet
            fits = text.startswith(literals[number], at)
            at += len(literals[number])
            if fits and number == len(contents):
                fits = at == len(text)
                if fits:
                    return chosen
            if not fits:
                index = len(STRIPS)
        while index < len(STRIPS) and not text.startswith(STRIPS[index](contents[number]), at):
            index += 1
        if index < len(STRIPS):
            chosen.append(index)
            starts.append(at)
            at, number, index = at + len(STRIPS[index](contents[number])), number + 1, 0
        elif chosen:
            at, number, index = starts.pop(), number - 1, chosen.pop() + 1
        else:
            return None
