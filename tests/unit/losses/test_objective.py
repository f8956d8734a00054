"""The objective: golden cases, the dense oracle with gradients, the shift by hand, and the same gradient for any split."""

import importlib.util
import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch

from fusion_ray.losses.head import picked_logits
from fusion_ray.losses.objective import Sparse, fusion_sums, nll_sums

ROOT = Path(__file__).parents[3]
_spec = importlib.util.spec_from_file_location("reference_losses", ROOT / "tests" / "reference" / "losses.py")
assert _spec is not None
assert _spec.loader is not None
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

GOLDEN = ROOT / os.environ.get("FUSION_RAY_GOLDEN", "../shared/golden")
CASES = sorted((GOLDEN / "loss").glob("*.json"))


@pytest.mark.golden
@pytest.mark.skipif(not CASES, reason=f"no golden cases under {GOLDEN}/loss")
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_golden(path: Path) -> None:
    case = json.loads(path.read_text())
    labels = torch.tensor(case["labels"])[:, 1:]  # position t predicts t + 1
    mask = labels != -100
    logits = torch.tensor(case["logits"], dtype=torch.float64)[:, :-1][mask]
    rows = mask.nonzero()[:, 0]
    pivot_ids, source_ids = (torch.tensor(case[f"{side}_topk_ids"])[:, :-1][mask] for side in ("pivot", "source"))
    pivot_lp, source_lp = (
        torch.tensor(case[f"{side}_topk_logits"], dtype=torch.float64)[:, :-1][mask] for side in ("pivot", "source")
    )
    source_wins = (torch.tensor(case["source_ce"]) < torch.tensor(case["pivot_ce"]))[rows]
    for expected in case["expected"]:
        from_source = source_wins if expected["targets"] == "mince" else torch.ones_like(source_wins)
        ids = torch.where(from_source[:, None], source_ids, pivot_ids)
        targets = Sparse(
            torch.where(from_source[:, None], source_lp, pivot_lp), torch.ones_like(from_source), from_source
        )
        picked, sums = picked_logits(logits, torch.eye(logits.shape[1], dtype=torch.float64), _ids(labels[mask], ids))
        total, metrics = fusion_sums(
            picked,
            sums,
            targets,
            lm_weight=case["lam"],
            divergence_name=expected["divergence"],
            temperature=expected["temperature"],
        )
        count = metrics["positions"]
        assert (metrics["nll"] / count).item() == pytest.approx(expected["sft_loss"], abs=1e-6)
        assert (metrics["fusion"] / count).item() == pytest.approx(expected["fusion_loss"], abs=1e-6)
        assert (total / count).item() == pytest.approx(expected["loss"], abs=1e-6)


def _ids(labels: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([labels[:, None], topk_ids], dim=1)


N, K, V, H = 12, 3, 17, 5


def problem() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    teacher = torch.log_softmax(torch.randn(N, V, generator=generator, dtype=torch.float64) * 2, -1)
    logprobs, ids = teacher.topk(K, dim=-1)
    logprobs[4] = -math.inf  # no target there
    logprobs[5, 1:] = -math.inf
    return {
        "hidden": torch.randn(N, H, generator=generator, dtype=torch.float64).requires_grad_(),
        "weight": torch.randn(V, H, generator=generator, dtype=torch.float64).requires_grad_(),
        "labels": torch.randint(0, V, (N,), generator=generator),
        "ids": ids,
        "logprobs": logprobs,
        "has_target": torch.tensor([n != 4 for n in range(N)]),
        "from_source": torch.tensor([n % 3 != 0 and n != 4 for n in range(N)]),
    }


def total_of(p: dict[str, torch.Tensor], part: slice = slice(None), *, chunk: int = 4, **how: object) -> torch.Tensor:
    picked, sums = picked_logits(p["hidden"][part], p["weight"], _ids(p["labels"][part], p["ids"][part]), chunk=chunk)
    targets = Sparse(p["logprobs"][part], p["has_target"][part], p["from_source"][part])
    total, _ = fusion_sums(picked, sums, targets, **how)  # type: ignore[arg-type]
    return total


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
@pytest.mark.parametrize("name", ["ce", "kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("on_pivot_win", ["distill", "sft"])
def test_equal_to_the_dense_oracle_with_gradients(on_pivot_win: str, name: str, tail: str) -> None:
    p = problem()
    how = {"lm_weight": 0.3, "on_pivot_win": on_pivot_win, "divergence_name": name, "tail": tail, "temperature": 2.0}
    got = total_of(p, **how)
    want = reference.dense_objective(
        p["hidden"] @ p["weight"].T,
        p["labels"].tolist(),
        p["ids"].tolist(),
        p["logprobs"].tolist(),
        p["has_target"].tolist(),
        p["from_source"].tolist(),
        **how,
    )
    assert got.item() == pytest.approx(want.item(), abs=1e-10)
    leaves = (p["hidden"], p["weight"])
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_any_split_gives_the_same_gradient() -> None:
    p = problem()
    whole = torch.autograd.grad(total_of(p, chunk=100, lm_weight=0.5), p["weight"])[0]
    for cuts in ([0, 12], [0, 1, 12], [0, 5, 7, 12], list(range(13))):
        parts = [
            torch.autograd.grad(total_of(p, slice(a, b), chunk=2, lm_weight=0.5), p["weight"])[0]
            for a, b in itertools.pairwise(cuts)
        ]
        assert torch.allclose(sum(parts, torch.zeros_like(whole)), whole, atol=1e-12)


def test_positions_without_a_target_get_the_plain_nll_with_weight_one() -> None:
    p = problem()
    nothing = p | {"has_target": torch.zeros(N, dtype=torch.bool), "from_source": torch.zeros(N, dtype=torch.bool)}
    nll = torch.nn.functional.cross_entropy(p["hidden"] @ p["weight"].T, p["labels"], reduction="sum")
    assert total_of(nothing, lm_weight=0.1).item() == pytest.approx(nll.item())


def test_metrics_are_sums_of_what_was_used() -> None:
    p = problem()
    picked, sums = picked_logits(p["hidden"], p["weight"], _ids(p["labels"], p["ids"]))
    targets = Sparse(p["logprobs"], p["has_target"], p["from_source"])
    _, distill = fusion_sums(picked, sums, targets, lm_weight=0.5)
    _, sft = fusion_sums(picked, sums, targets, lm_weight=0.5, on_pivot_win="sft")
    assert (distill["positions"], distill["distilled"], distill["from_source"]) == (N, N - 1, 7)
    assert (sft["positions"], sft["distilled"], sft["from_source"]) == (N, 7, 7)
    total, plain = nll_sums(picked, sums)
    assert total.item() == pytest.approx(distill["nll"].item())
    assert (plain["fusion"], plain["distilled"]) == (0, 0)


def test_unknown_switch_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown on_pivot_win 'drop': choose distill or sft"):
        total_of(problem(), lm_weight=0.5, on_pivot_win="drop")
