"""A token's text as one can see it: blanks, control characters, joiners and lone combining marks get signs of their own. Called by the report's page
and by the terminal's view of a row."""

import unicodedata

SIGNS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "\x7f": "␡"}
NOTHING = "∅"
BASE = "◌"  # what a combining mark without a letter stands on


def visible(text: str) -> str:
    """`text` in one line without anything that is invisible, moves the cursor or joins its neighbours; ∅ where there is no text."""
    shown = "".join(map(_sign, text))
    if text and unicodedata.category(text[0]).startswith("M"):
        shown = BASE + shown
    return shown or NOTHING


def _sign(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    if character < " ":
        return chr(0x2400 + ord(character))  # the control pictures
    # joiners, directions and other format characters, C1 controls, line separators, other blanks, private and unassigned ones
    if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Zs", "Co", "Cn", "Cs"):
        return f"⟨{ord(character):X}⟩"
    return character
