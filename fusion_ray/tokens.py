"""Token ids of a model folder as text that can be printed. Called by inspect_artifact.py and exchange.py. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from fusion_ray.report.visible import visible


@dataclass(frozen=True)
class Words:
    """`pieces[id]` is the bytes of a token; without pieces, tokens are shown as their ids."""

    pieces: tuple[bytes, ...] = ()

    def text(self, token: int) -> str:
        """The token with white space and bytes that are no character made visible; an id beyond the tokenizer as `<id>`."""
        if not self.pieces:
            return str(token)
        known = 0 <= token < len(self.pieces) and self.pieces[token]
        return visible(self.pieces[token].decode("utf-8", "backslashreplace")) if known else f"<{token}>"


def read_words(folder: str) -> Words:
    """Raises ValueError for a folder without tokenizer.json, or whose tokens do not say which bytes they stand for."""
    from tokenizers import Tokenizer

    from fusion_ray.corpus.pieces import read_pieces  # imports transformers: half a second

    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no tokenizer.json")

    class Fast:
        """What read_pieces asks of a tokenizer, without loading the model's configuration."""

        name_or_path = folder
        is_fast = True
        backend_tokenizer = Tokenizer.from_file(str(file))

    return Words(tuple(read_pieces(Fast()).pieces))
