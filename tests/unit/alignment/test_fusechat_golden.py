"""The published alignment's outputs, every position: the golden cases of alignment. Skipped where the folder is absent."""

import gzip
import json
import os
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from tokenizers import Tokenizer

from fusion_ray.alignment.counts import PairCounts
from fusion_ray.alignment.fusechat import EMPTY, ONE_HOT, choose_rows, met_pairs, move_rows
from fusion_ray.alignment.fusechat_maps import min_edit_strings, row_map, statistics_strings
from fusion_ray.alignment.nearest import nearest
from fusion_ray.alignment.programme import Matches, join_matches, match_tokens
from fusion_ray.alignment.token_strings import TokenStrings

GOLDEN = Path(os.environ.get("FUSION_RAY_GOLDEN", Path(__file__).parents[4] / "shared" / "golden"))
CASES = [path.parent for path in sorted(GOLDEN.glob("*/alignment.json.gz"))]
pytestmark = [
    pytest.mark.golden,
    pytest.mark.skipif(not CASES, reason=f"no golden cases of alignment under {GOLDEN}"),
    pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name),
]


@cache
def case(folder: Path) -> dict:
    return json.loads(gzip.decompress((folder / "alignment.json.gz").read_bytes()))


@cache
def strings(folder: Path, side: str) -> TokenStrings:
    tokenizer = Tokenizer.from_file(str(folder / f"{side}_tokenizer.json"))
    ids = range(tokenizer.get_vocab_size())
    bos, eos, unk = (tokenizer.token_to_id(name) for name in ("<s>", "</s>", "<unk>"))
    return TokenStrings(
        [tokenizer.decode([number]) for number in ids],
        [tokenizer.id_to_token(number) for number in ids],
        case(folder)[f"{side}_special"],
        bos,
        eos,
        unk,
    )


@cache
def matched(folder: Path) -> list[tuple[np.ndarray, np.ndarray, Matches]]:
    """Pivot ids, source ids and their matches, of every sequence."""
    pivot, source = strings(folder, "pivot"), strings(folder, "source")
    found = []
    for sequence in case(folder)["sequences"]:
        mine, theirs = (np.array(sequence[f"{side}_ids"], np.int32) for side in ("pivot", "source"))
        found.append((mine, theirs, match_tokens(theirs, mine, source, pivot)))
    return found


@cache
def counted(folder: Path) -> PairCounts:
    total = PairCounts.none()
    for mine, theirs, matches in matched(folder):
        total = total + PairCounts.of_pairs(*met_pairs(matches, mine, theirs))
    return total


def test_source_positions_of_every_pivot_position(folder: Path) -> None:
    for sequence, (_, _, matches) in zip(case(folder)["sequences"], matched(folder), strict=True):
        assert matches.lists() == sequence["pivot_to_source"]


def test_counts(folder: Path) -> None:
    expected = case(folder)["mapping_statistics"]
    counts = counted(folder)
    found = sorted(zip(counts.pivot_ids.tolist(), counts.source_ids.tolist(), counts.counts.tolist(), strict=True))
    assert found == sorted(zip(expected["pivot_id"], expected["source_id"], expected["count"], strict=True))


def test_statistics_map(folder: Path) -> None:
    mapped = statistics_strings(strings(folder, "source"), strings(folder, "pivot"), counted(folder))
    assert mapped.tolist() == case(folder)["source_to_pivot_ms"]


def test_min_edit_map(folder: Path) -> None:
    """The recorded ties follow the order of one process' `get_vocab()`, which is a hash map's: an order that explains all choices is found first."""
    pivot, source = strings(folder, "pivot"), strings(folder, "source")
    texts = [source.with_marker(piece, pivot.marker) for piece in source.pieces]
    distances = cdist(texts, list(pivot.pieces), scorer=Levenshtein.distance, dtype=np.int32)
    expected = np.array(case(folder)["source_to_pivot_mined"])
    behind: dict[int, set[int]] = {number: set() for number in range(pivot.size)}
    for row, first in zip(distances, expected.tolist(), strict=True):
        for other in np.flatnonzero(row == row.min()).tolist():
            if other != first:
                behind[other].add(first)
    order = list(TopologicalSorter(behind).static_order())
    found = nearest(texts, [pivot.pieces[number] for number in order])
    assert np.array(order)[found].tolist() == expected.tolist()
    by_id = min_edit_strings(source, pivot)  # the package's order: of equally near pieces the lowest id
    assert by_id.tolist() == distances.argmin(axis=1).tolist()


@pytest.mark.parametrize(("rules", "key"), [("statistics", "ms"), ("exact", "em")])
def test_rows_of_every_position(folder: Path, rules: str, key: str) -> None:
    pivot, source = strings(folder, "pivot"), strings(folder, "source")
    mapped = row_map(rules, source, pivot, counted(folder))
    sequences = case(folder)["sequences"]
    transferred = 0
    for sequence, (mine, theirs, matches) in zip(sequences, matched(folder), strict=True):
        chosen = choose_rows(matches, mine, theirs, pivot=pivot, source=source, rules=rules, mapped=mapped)
        topk = np.array(sequence["source_topk_ids"], np.int32), np.array(sequence["source_topk_logits"], np.float32)
        ids, logits, _, _ = move_rows(chosen, *topk, mapped=mapped, width=topk[0].shape[1])
        expected = sequence["expected"][key]
        for at in range(mine.size):
            if chosen[at] == ONE_HOT:
                found = [int(mine[min(at + 1, mine.size - 1)])], [1.0]
            else:
                used = int(np.isfinite(logits[at]).sum())
                found = ids[at, :used].tolist(), pytest.approx(logits[at, :used].tolist(), abs=1e-6)
                transferred += chosen[at] != EMPTY
            assert (expected["ids"][at], expected["logits"][at]) == found, at
    assert transferred > 100


def test_all_sequences_at_once_are_as_one_by_one(folder: Path) -> None:
    """The form in which a shard is aligned: rows one after another."""
    pivot, source = strings(folder, "pivot"), strings(folder, "source")
    mapped = row_map("statistics", source, pivot, counted(folder))
    options = {"pivot": pivot, "source": source, "rules": "statistics", "mapped": mapped}
    parts = matched(folder)
    starts = np.cumsum([0, *(theirs.size for _, theirs, _ in parts)])
    joined = join_matches([matches for _, _, matches in parts], starts[:-1])
    everyone = [np.concatenate([part[side] for part in parts]) for side in (0, 1)]
    found = choose_rows(joined, *everyone, **options)
    alone = [choose_rows(matches, mine, theirs, **options) for mine, theirs, matches in parts]
    moved = [np.where(part >= 0, part + start, part) for part, start in zip(alone, starts, strict=False)]
    assert found.tolist() == np.concatenate(moved).tolist()
    counts = PairCounts.of_pairs(*met_pairs(joined, *everyone))
    assert counts.keys.tolist() == counted(folder).keys.tolist()
    assert counts.counts.tolist() == counted(folder).counts.tolist()
