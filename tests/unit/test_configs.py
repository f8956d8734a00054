"""Every config file in jobs/configs loads, says what it may say to the stages, and states the papers' values where it claims to."""

import re
from pathlib import Path

import pytest
import yaml

from fusion_ray.config import ConfigError, FusionConfig, load_config
from fusion_ray.graph import build_graph
from fusion_ray.merging.parameters import complete_parameters
from fusion_ray.plan import problems

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
PRESETS = {"demo", "fusechat_7b_varm", "fusechat_7b_sce", "small_gpu", "recommended"}
SECRET = re.compile(r"(sk-|hf_|AKIA|AIza)[A-Za-z0-9]{16,}")


def load(name: str) -> FusionConfig:
    return load_config(CONFIGS / f"{name}.yaml")


def test_the_presets_are_there() -> None:
    assert {path.stem for path in FILES} >= PRESETS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_loads(path: Path) -> None:
    config = load_config(path)
    for method in config.merge.methods:
        complete_parameters(method.method, method.parameters, targets=len(config.sources))
    assert config.distill.batch_size % (config.distill.micro_batch_size * config.resources.distill.max_workers) == 0
    for pool in (config.resources.teach, config.resources.evaluate):
        assert pool.gpus in (0, pool.engine.get("tensor_parallel_size", 1)), (
            "an engine has as many GPUs as it is split over"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_cannot_be_aligned_is_a_problem_of_the_plan(path: Path, tmp_path: Path) -> None:
    for overrides, expected in (
        ([], []),
        (["align.method=fusechat", "align.map=prefix"], ["align.map is 'prefix'"]),
        (["align.method=fusechat", "align.map=exact", "align.inside=label"], ["align.inside is 'label'"]),
    ):
        config = load_config(path, [f"run.storage={tmp_path}", *overrides])
        graph = build_graph(load("demo"))  # of local models; the problems asked for are the settings' own
        sizes = dict.fromkeys(model.name for model in (config.pivot, *config.sources))
        found = [problem for problem in problems(config, graph, sizes, 0.0) if problem.startswith("align.")]
        assert [problem[: len(start)] for problem, start in zip(found, expected, strict=True)] == expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_config_holds_a_secret_or_a_machine_s_path(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not SECRET.search(text)
    for value in strings(yaml.safe_load(text)):
        assert not value.startswith(("/", "~")), value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_misspelt_key_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'lm_weight'"):
        load_config(path, ["distill.lm_weigth=0.5"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_hub_models_name_a_revision(path: Path) -> None:
    config = load_config(path)
    for model in (config.pivot, *config.sources):
        assert model.revision or Path(model.path).exists(), f"{model.name}: a hub id without a revision"


@pytest.mark.parametrize("name", ["fusechat_7b_varm", "fusechat_7b_sce"])
def test_the_papers_settings(name: str) -> None:
    config = load(name)
    assert config.pivot.path == "openchat/openchat_3.5"
    assert (config.teach.top_k, config.corpus.template) == (10, "pivot")
    assert (config.align.choose, config.align.per, config.align.unit) == ("min_ce", "sequence", "token")
    distill = config.distill
    assert (distill.lm_weight, distill.on_pivot_win, distill.divergence, distill.temperature) == (
        0.9,
        "distill",
        "ce",
        1.0,
    )
    assert (distill.epochs, distill.batch_size, distill.micro_batch_size, distill.max_length) == (3, 128, 4, 2048)
    assert (distill.learning_rate, distill.schedule, distill.warmup_ratio) == (5e-6, "cosine", 0.03)
    assert (distill.weight_decay, distill.betas, distill.max_grad_norm) == (0.0, (0.9, 0.999), 1.0)


def test_the_papers_merges() -> None:
    varm, sce = load("fusechat_7b_varm"), load("fusechat_7b_sce")
    assert len(varm.sources) == 2
    assert (varm.merge.methods[0].method, varm.merge.methods[0].granularity) == ("varm", "matrix")
    assert len(sce.sources) == 5
    first = sce.merge.methods[0]
    assert (first.method, first.variant, first.select_topk) == ("sce", "paper", 0.1)


def test_the_recommended_recipe() -> None:
    config = load("recommended")
    assert (config.align.method, config.align.map, config.align.inside) == ("spans", "shares", "skip")
    assert (config.distill.lm_weight, config.distill.on_pivot_win) == (0.3, "sft")
    assert config.merge.methods[0].method == "varm"
    assert config.distill.sft_control


def test_the_small_run_needs_one_gpu() -> None:
    config = load("small_gpu")
    resources = config.resources
    pools = (resources.teach, resources.align, resources.distill, resources.merge, resources.serve, resources.evaluate)
    assert max(pool.gpus * pool.max_workers for pool in pools) == 1
    assert resources.branches == 1


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []
