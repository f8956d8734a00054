"""One row of a data file becomes a checked Conversation, or a reason why not. Called by readers.py.

Formats: ShareGPT `{conversations: [{from, value}]}`, OpenAI `{messages: [{role, content}]}`, Alpaca `{instruction, input, output}` and
`{prompt, completion}`; `auto` decides by the keys of each row.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

from fusion_ray.records import Conversation, Message

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
}
FORMATS = ("auto", "sharegpt", "messages", "alpaca", "prompt")
_FORMAT_KEYS = {
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
}
_OTHER_KEYS = {"alpaca": ("input", "system"), "prompt": ("system",)}


class RowError(ValueError):
    """A row that is no conversation; the message is the reason that goes to rejected.parquet."""


def parse_row(row: object, *, format: str, dataset: str) -> Conversation:
    """The conversation in one decoded row. Raises RowError with the reason."""
    if not isinstance(row, Mapping):
        raise RowError(f"the row is a {type(row).__name__}, expected an object")
    kind = _detect(row) if format == "auto" else format
    if kind in ("sharegpt", "messages"):
        key = _FORMAT_KEYS[kind][0]
        messages = _turns(row.get(key), key)
    elif kind == "alpaca":
        request = _text(row.get("instruction"), "instruction")
        extra = _text(row.get("input") or "", "input")
        messages = _pair(row, request + ("\n\n" + extra if extra else ""), _text(row.get("output"), "output"))
    else:
        messages = _pair(row, _text(row.get("prompt"), "prompt"), _text(row.get("completion"), "completion"))
    _check(messages)
    return Conversation(_id(row, messages), tuple(messages), dataset)


def keys_read(format: str) -> set[str]:
    """The keys of a row that `parse_row` looks at."""
    kinds = _FORMAT_KEYS if format == "auto" else (format,)
    return {"id"}.union(*(_FORMAT_KEYS[kind] + _OTHER_KEYS.get(kind, ()) for kind in kinds))


def content_id(messages: Sequence[Message]) -> str:
    """32 hex digits that depend on roles and contents alone."""
    text = json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def _detect(row: Mapping[str, object]) -> str:
    for kind, keys in _FORMAT_KEYS.items():
        if all(row.get(key) is not None for key in keys):
            return kind
    wanted = "; ".join(" + ".join(keys) for keys in _FORMAT_KEYS.values())
    raise RowError(f"no known format: the row has the keys {sorted(map(str, row))[:8]}, expected one of: {wanted}")


def _turns(turns: object, key: str) -> list[Message]:
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes):
        raise RowError(f"`{key}` is a {type(turns).__name__}, expected a list of messages")
    return [_message(turn, f"{key}[{number}]") for number, turn in enumerate(turns)]


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"{where} is a {type(turn).__name__}, expected an object")
    role = turn.get("from") if turn.get("from") is not None else turn.get("role")
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        raise RowError(f"{where} has the unknown role {role!r}, expected one of {', '.join(sorted(ROLES))}")
    content = turn.get("value") if turn.get("value") is not None else turn.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(part, where) for part in content)
    return Message(ROLES[role.strip().lower()], _text(content, f"the content of {where}"))


def _part(part: object, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        return _text(part.get("text"), f"the content of {where}")
    raise RowError(f"{where} has a content part that is not text")


def _pair(row: Mapping[str, object], request: str, answer: str) -> list[Message]:
    system = _text(row.get("system") or "", "system")
    head = [Message("system", system)] if system else []
    return [*head, Message("user", request), Message("assistant", answer)]


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{what} is a {type(value).__name__}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{what} holds a lone surrogate at character {error.start}, which is no Unicode text") from None
    return value


def _check(messages: Sequence[Message]) -> None:
    """System only at the start, then user and assistant in turn, with an assistant turn that says something."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for number, message in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if message.role != expected:
            raise RowError(
                f"roles out of order: message {len(messages) - len(turns) + number} is {message.role}, expected {expected}"
            )
        if message.role == "assistant" and not message.content.strip():
            raise RowError(f"message {len(messages) - len(turns) + number} is an empty assistant message")
    if len(turns) < 2:
        raise RowError("no assistant turn")


def _id(row: Mapping[str, object], messages: Sequence[Message]) -> str:
    given = row.get("id")
    if given is None or given == "":
        return content_id(messages)
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise RowError(f"`id` is a {type(given).__name__}, expected text or a whole number")
    return _text(str(given), "`id`")
