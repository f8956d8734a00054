"""What a merge will do, from the models' headers alone: its gates, the recipe of every output tensor, the output's shards. Called by `merge_job.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusion_ray.checkpoints.dtypes import BY_CONFIG_NAME, MERGEABLE
from fusion_ray.checkpoints.gates import check_compatible, check_shapes, compare_configs, tied_heads
from fusion_ray.checkpoints.plan import PlannedTensor, WorkUnit, plan_units
from fusion_ray.checkpoints.reader import Checkpoint, open_checkpoint
from fusion_ray.config import ModelConfig, is_url
from fusion_ray.merge_recipe import Recipe, tensor_recipes, unmatched_filters
from fusion_ray.merging.parameters import complete_parameters
from fusion_ray.merging.recipe import TensorRecipe
from fusion_ray.models import local_folder
from fusion_ray.store import Artifact
from fusion_ray.workers.find_cuda import DeviceKind
from fusion_ray.workers.merger import Models, Recipes


@dataclass(frozen=True)
class MergeJob:
    """What is merged and how; picklable. `models` are named places with the pivot first: an artefact, or a model reference.

    Every tensor is merged alike, all models after the first into it, unless a `recipe` (a merge file's) says otherwise.
    """

    models: tuple[tuple[str, Artifact | ModelConfig], ...]
    method: str
    parameters: Mapping[str, object]
    dtype: str
    max_bytes_in_flight: int
    max_shard_bytes: int
    threads: int = 1
    device: DeviceKind = "cpu"  # for speed alone: the bytes are the same
    recipe: Recipe | None = None
    files_of: int = 0  # the model whose config is copied: the base, else the first
    tokenizer: str | None = (
        None  # the folder whose tokenizer files and chat template are copied; that of `files_of` by default
    )
    chat_template: str | None = None  # another one
    layers: int | None = None  # of the output, where slices change their number
    extra_files: tuple[tuple[str, str], ...] = ()  # names and texts of files that go beside the tensors

    def open(self) -> Models:
        """The models, from their headers. Raises MergeError for a folder that is not whole."""
        checkpoints = tuple(open_checkpoint(_folder_of(place), model=name) for name, place in self.models)
        return Models(checkpoints, self.max_bytes_in_flight, self.threads)


@dataclass(frozen=True)
class MergePlan:
    """`recipes` by output tensor, in the order of the pivot; `tied` output heads that are left out; config keys that differ without effect; the shards."""

    recipes: Recipes
    tied: tuple[str, ...]
    config_differences: dict[str, dict[str, object]]
    units: tuple[WorkUnit, ...]
    warnings: tuple[str, ...] = ()  # settings that do nothing

    @property
    def targets(self) -> tuple[int, ...]:
        """Places of targets in the recipes."""
        return tuple(range(max((len(recipe.models) for recipe in self.recipes.values()), default=0)))

    @property
    def alike(self) -> bool:
        """Whether all tensors have the same targets, so that statistics of one are a target's."""
        return len({recipe.models for recipe in self.recipes.values()}) == 1

    @property
    def keeps_names(self) -> bool:
        """Whether every tensor is called what it is called in all models (slices renumber layers), so that statistics by name hold in other merges."""
        return all(name == recipe.name for recipe in self.recipes.values() for _, name in recipe.inputs)


def plan_merge(job: MergeJob, models: Models) -> MergePlan:
    """Raises MergeError for models that do not merge, ValueError for parameters that the method does not take."""
    pivot = models.checkpoints[job.files_of]
    targets = [model for model in models.checkpoints if model is not pivot]
    if job.recipe is None:
        parameters = complete_parameters(job.method, job.parameters, targets=len(targets))
        compatible = check_compatible(pivot, targets)
        recipes = {name: _uniform(name, job.method, len(targets), parameters) for name in compatible.tensors}
        tied, differences = compatible.tied, compatible.config_differences
    else:
        # Slices take layers from models of different depth.
        depth = () if job.layers is None else ("num_hidden_layers", "n_layer", "num_layers", "layer_types")
        differences = compare_configs(pivot, targets, but=depth)
        tied = tied_heads(models.checkpoints)
        names = [[name for name in model.tensors if name not in tied] for model in models.checkpoints]
        recipes = {recipe.name: recipe for recipe in tensor_recipes(job.recipe, names)}
        check_shapes(models.checkpoints, list(recipes.values()))
    return MergePlan(recipes, tied, differences, _shards(job, models.checkpoints, recipes), _warnings(job, recipes))


def _warnings(job: MergeJob, recipes: Recipes) -> tuple[str, ...]:
    found = [] if job.recipe is None else unmatched_filters(job.recipe, list(recipes))
    if any(
        recipe.method == "sce" and len(recipe.models) == 1 and _selects(recipe.parameters)
        for recipe in recipes.values()
    ):
        found.append(
            "sce with one target selects nothing: one target has no variance over the targets, and the result is the base; give several targets, or "
            "select_topk 1"
        )
    return tuple(found)


def _selects(parameters: Mapping[str, object]) -> bool:
    """The released code leaves in what is not selected."""
    share = parameters.get("select_topk")
    return isinstance(share, float) and share < 1 and parameters.get("variant") != "fusechat_release"


def _uniform(name: str, method: str, targets: int, parameters: Mapping[str, object]) -> TensorRecipe:
    return TensorRecipe(
        name=name,
        method=method,
        models=tuple(range(1, targets + 1)),
        names=(name,) * targets,
        base=0,
        base_name=name,
        parameters=parameters,
    )


def _shards(job: MergeJob, models: Sequence[Checkpoint], recipes: Recipes) -> tuple[WorkUnit, ...]:
    """`job.dtype` is float32, bfloat16, float16 or pivot (each tensor as the pivot stores it); integer tensors stay what they are."""
    tensors = []
    for name, recipe in recipes.items():
        number, stored = recipe.reference
        info = models[number].tensors[stored]
        dtype = BY_CONFIG_NAME.get(job.dtype, info.dtype) if info.dtype in MERGEABLE else info.dtype
        tensors.append(PlannedTensor(name, dtype, info.shape, info.size))
    return plan_units(tensors, max_shard_bytes=job.max_shard_bytes)


def _folder_of(place: Artifact | ModelConfig) -> str:
    """A local folder, or the URL that it is read from range by range; models of the hub are downloaded."""
    if isinstance(place, Artifact):
        return place.path() if place.is_local else place.url
    return place.path if is_url(place.path) else local_folder(place.path, place.revision)
