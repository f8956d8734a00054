"""A driver of the teach stage to be killed: `python teach_driver.py TASK`, TASK as JSON (see tests/ray/test_teach_chaos.py)."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from fusion_ray.config import ModelConfig, ResourcesConfig, TeachConfig, TeachResources
from fusion_ray.stages.cluster import connected
from fusion_ray.stages.teach import teach
from fusion_ray.store import Artifact


def main(task: dict) -> None:
    out, corpus = (Artifact(task[name], stage, task[name]) for name, stage in (("out", "teach"), ("corpus", "corpus")))
    with connected(ResourcesConfig(address=task["address"])):
        teach(
            out,
            corpus,
            model=ModelConfig(name="one", path=task["model"], dtype="float32"),
            template=None,
            config=TeachConfig(top_k=5, max_length=256),
            max_rejected=0.0,
            seed=0,
            resources=TeachResources(min_workers=1, max_workers=2),
            report=lambda figures: None,
        )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
