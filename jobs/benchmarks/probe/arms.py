"""What the gain of an alignment is made of: one arm an alignment, all else equal. Called by `jobs/benchmarks/alignment_gain.py`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

SAME, OTHER, NONE = "same", "other", "sft"  # the teacher: the pivot's tokenizer, another one, nobody
Settings = Mapping[str, object]


@dataclass(frozen=True)
class Arm:
    """One training. `name` is what its figures are called by; `group` says what the arm is there to tell."""

    name: str
    teacher: str
    align: Settings = field(default_factory=dict)
    teach: Settings = field(default_factory=dict)
    distill: Settings = field(default_factory=dict)
    group: str = "alignment"


def _spans(vocabulary_map: str, *, chain: bool, inside: str = "skip") -> Settings:
    return {"method": "spans", "map": vocabulary_map, "chain": chain, "inside": inside}


def _fusechat(vocabulary_map: str) -> Settings:
    return {"method": "fusechat", "map": vocabulary_map}


EXACT = _spans("exact", chain=False)
BUCKET: Settings = {"tail": "bucket"}
# What more candidates and the tail are tried with.
BEST: tuple[tuple[str, str, Settings], ...] = (
    ("same_tokenizer", SAME, EXACT),
    *(
        (f"spans_{name}_chain{'_condition' * (inside == 'condition')}", OTHER, _spans(name, chain=True, inside=inside))
        for name in ("canonical", "shares")
        for inside in ("skip", "condition")
    ),
)
ARMS = (
    Arm("sft", NONE),
    Arm("same_tokenizer", SAME, EXACT),
    Arm("fusechat_exact", OTHER, _fusechat("exact")),
    Arm("fusechat_min_edit", OTHER, _fusechat("min_edit")),
    Arm("fusechat_statistics", OTHER, _fusechat("statistics")),
    *(
        Arm(f"spans_{name}", OTHER, _spans(name, chain=False))
        for name in ("exact", "min_edit", "statistics", "prefix", "canonical")
    ),
    *(
        Arm(f"spans_{name}_chain", OTHER, _spans(name, chain=True))
        for name in ("exact", "prefix", "canonical", "shares")
    ),
    Arm("spans_canonical_condition", OTHER, _spans("canonical", chain=False, inside="condition")),
    *(
        Arm(f"spans_{name}_chain_condition", OTHER, _spans(name, chain=True, inside="condition"))
        for name in ("canonical", "shares")
    ),
    *(
        Arm(f"{name}_k{k}", teacher, align, teach={"top_k": k}, group="top_k")
        for k in (32, 64)
        for name, teacher, align in BEST
    ),
    *(Arm(f"{name}_bucket", teacher, align, distill=BUCKET, group="tail") for name, teacher, align in BEST),
    *(
        Arm(f"{name}_k64_bucket", teacher, align, teach={"top_k": 64}, distill=BUCKET, group="tail")
        for name, teacher, align in BEST
    ),
)
# docs/alignment.md: every method and map, and what recommended.yaml does. The others tell what the rest is made of.
TABLE = (
    "sft",
    "same_tokenizer",
    "fusechat_exact",
    "fusechat_min_edit",
    "fusechat_statistics",
    "spans_exact",
    "spans_min_edit",
    "spans_statistics",
    "spans_prefix",
    "spans_canonical",
    "spans_canonical_chain",
    "spans_shares_chain",
    "spans_shares_chain_k64",
)
