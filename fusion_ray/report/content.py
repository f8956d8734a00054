"""What the report is made of: the shape of report.json and of the artefacts laid beside it, and the order in which models and categories are shown.

Plain dictionaries as JSON gives them; every part of `Extras`, and every part of `RunReport` but `run`, may be missing. Called by html, charts and text.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from fusion_ray.alignment.explain import ExplainedRow

Role = Literal["pivot", "source", "sft", "target", "fused"]
ROLES: tuple[Role, ...] = ("pivot", "source", "sft", "target", "fused")
ROLE_NAMES: Mapping[str, str] = {"sft": "SFT only"}
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
OVERALL = "overall"


class Interval(TypedDict):
    """A mean with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


class Score(Interval):
    """Scores lie in 0..1; `n` items."""

    n: int


class ModelScores(TypedDict, total=False):
    """One evaluated model. `merge` is the merge's label for a fused model, else None."""

    name: str
    role: Role
    merge: str | None
    parameters: int | None
    scores: dict[str, Score]
    overall: Score | None
    bits_per_byte: float | None


class StageRun(TypedDict):
    stage: str
    branch: str | None
    key: str
    status: str
    seconds: float


class TokenPair(TypedDict):
    """What a source token became in the pivot's vocabulary (None: nothing), with the probability that went so and the positions where it did."""

    source: str
    pivot: str | None
    mass: float
    positions: int


class AlignmentSummary(TypedDict, total=False):
    """One source. `coverage`: kind of match to its share of the pivot's predicting positions; the other figures are shares, as alignment/coverage.py
    defines them, and counts of rows and positions. `worst_pairs`: those whose bytes differ, the heaviest first."""

    source: str
    rows: int | None
    rejected: int | None
    positions: int | None
    coverage: dict[str, float]
    mass_kept: float | None
    one_hot: float | None
    top1_agreement: float | None
    source_won: float | None
    positions_won: float | None
    positions_from_source: float | None
    worst_pairs: list[TokenPair]


class MergeSummary(TypedDict):
    """One merge. `reused`: the targets whose statistics came from an earlier merge, so that their tensors were not measured again."""

    name: str
    method: str
    reused: list[str]


class CombinedSummary(TypedDict):
    """The one target of all sources (`distill.branches: all`): its rows, and how many of them each source won. The others are the pivot's own."""

    rows: int
    won: dict[str, int]


class SourceCounts(TypedDict):
    """Rows of one source of the corpus; `kept` are the conversations in the artefact."""

    read: int
    kept: int
    rejected: int
    duplicates: int


class CorpusSummary(TypedDict, total=False):
    """The corpus: conversations, rows that were malformed, copies that were left out, and the same by source."""

    rows: int
    rejected: int
    duplicates: int
    sources: dict[str, SourceCounts]


class RunReport(TypedDict, total=False):
    """report.json of a run."""

    run: str
    versions: dict[str, str]
    stages: list[StageRun]
    corpus: CorpusSummary
    models: list[ModelScores]
    alignment: list[AlignmentSummary]
    combined: CombinedSummary
    merges: list[MergeSummary]
    engine: dict[str, str]


class MergeWeight(TypedDict):
    """What one target got for one matrix of one layer (`layer` None: outside the layers), a share of all targets' weight."""

    layer: int | None
    matrix: str
    target: str
    weight: float


class Extras(TypedDict, total=False):
    """What the page shows beyond report.json. Every part may be left out.

    `training`: branch to the rows of its metrics.jsonl (`step`, `sft`, `fusion`, `distilled`: the share of positions under the fusion loss, and at some steps
    `heldout_bits_per_byte`).
    `merges`: merge label to its weights. `alignment_examples`: source to rows. `paired`: model to category (or `overall`) to the paired bootstrap
    interval of the difference model - pivot over the same items. `judge`: model to turn (`turn 1`, `turn 2`, `both`) to the judge's mean score in 1..10.
    """

    training: Mapping[str, Sequence[Mapping[str, float]]]
    merges: Mapping[str, Sequence[MergeWeight]]
    alignment_examples: Mapping[str, Sequence[ExplainedRow]]
    paired: Mapping[str, Mapping[str, Interval]]
    judge: Mapping[str, Mapping[str, float]]


def sorted_models(models: Sequence[ModelScores]) -> list[ModelScores]:
    """By role (pivot, sources, SFT only, targets, fused), then in the order given."""
    return sorted(models, key=lambda model: ROLES.index(model["role"]) if model.get("role") in ROLES else len(ROLES))


def role_name(model: ModelScores) -> str:
    """The role in words, with the merge's label for a fused model that is not named after it."""
    role = model.get("role", "")
    merge = model.get("merge")
    label = ROLE_NAMES.get(role, role)
    return f"{label} ({merge})" if merge and merge not in model.get("name", "") else label


def categories(models: Sequence[ModelScores]) -> list[str]:
    """Every category that some model has, MT-Bench's in its order first."""
    found = dict.fromkeys(name for model in models for name in model.get("scores") or {})
    return [name for name in CATEGORIES if name in found] + [name for name in found if name not in CATEGORIES]


def score_of(model: ModelScores, category: str) -> Score | None:
    return model.get("overall") if category == OVERALL else (model.get("scores") or {}).get(category)


def by_role(models: Sequence[ModelScores], role: Role) -> list[ModelScores]:
    return [model for model in models if model.get("role") == role]


def best_source(models: Sequence[ModelScores]) -> ModelScores | None:
    """The source with the highest overall score."""
    scored = [(overall["mean"], model) for model in by_role(models, "source") if (overall := model.get("overall"))]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def against_pivot(
    paired: Mapping[str, Mapping[str, Interval]], model: ModelScores, category: str
) -> Literal["above", "below", "noise"] | None:
    """Where the paired interval of model - pivot lies: above zero, below it, or over it (inside the noise). None where no interval is given."""
    interval = paired.get(model.get("name", ""), {}).get(category)
    if interval is None or model.get("role") == "pivot":
        return None
    if interval["low"] > 0:
        return "above"
    return "below" if interval["high"] < 0 else "noise"
