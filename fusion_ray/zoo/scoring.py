"""Exact match of an answer with its reference, blind to case, spacing and a full stop at the end."""


def normalise(text: str) -> str:
    """`text` stripped, white space runs made one space, case folded, one trailing full stop dropped."""
    return " ".join(text.split()).casefold().removesuffix(".").rstrip()


def exact_match(answer: str, reference: str) -> bool:
    return normalise(answer) == normalise(reference)
