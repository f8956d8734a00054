"""The report's sections on how the fused model came about: training curves and merge weights. Called by html."""

from collections.abc import Mapping, Sequence
from html import escape

from fusion_ray.report import charts_process as charts
from fusion_ray.report.content import Extras, MergeWeight
from fusion_ray.report.svg import Style, legend

LOSSES: Mapping[str, tuple[str, str]] = {
    "sft": ("SFT loss", "nats a position"),
    "fusion": ("fusion loss", "nats a position"),
    "heldout_bits_per_byte": ("held-out conversations", "bits per byte"),
}


def training(training: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    drawing = charts.training_curves(training, LOSSES)
    if not drawing:
        return '<p class="note">No training curves were recorded for this run.</p>'
    names = legend((branch, Style(charts.branch_colour(n), 2.4)) for n, branch in enumerate(training))
    caption = "Losses of each optimizer step's batch for every branch; the fusion loss over the positions that were distilled."
    if any("heldout_bits_per_byte" in row for rows in training.values() for row in rows):
        caption += " No step trains on the held-out conversations, which are the same for every branch."
    return f"<figure>{drawing}{names}<figcaption>{caption}</figcaption></figure>"


def merges(extras: Extras) -> str:
    found = extras.get("merges") or {}
    if not found:
        return '<p class="note">This run merged nothing.</p>'
    return "\n".join(f"<h3>{escape(label)}</h3>{_weights(label, rows)}" for label, rows in found.items())


def _weights(label: str, rows: Sequence[MergeWeight]) -> str:
    if not rows:
        return '<p class="note">This merge has no weights by layer and matrix: each element has its own.</p>'
    caption = "What each target got; a column is a layer, <code>-</code> stands for tensors outside the layers."
    return f"<figure>{charts.merge_weights(rows, label)}<figcaption>{caption}</figcaption></figure>"
