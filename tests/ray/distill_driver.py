"""A driver of the distill stage to be killed: `python distill_driver.py TASK`, TASK as JSON (see tests/ray/distilling.py)."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from fusion_ray.config import DistillConfig, DistillResources, ModelConfig, ResourcesConfig
from fusion_ray.stages.cluster import connected
from fusion_ray.stages.distill import distill
from fusion_ray.store import Artifact


def main(task: dict) -> None:
    out = Artifact(task["out"], "distill", task["key"])
    rows = Artifact(task["rows"], "align", "rows")
    with connected(ResourcesConfig(num_cpus=4, object_store_gb=0.2)):
        distill(
            out,
            rows,
            pivot=ModelConfig(name="pivot", path=task["pivot"]),
            config=DistillConfig.model_validate(task["config"]),
            seed=7,
            max_rejected=0.1,
            resources=DistillResources(max_workers=task["workers"]),
            report=lambda figures: None,
        )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
