"""Actors without an engine: what is left of the teach stage is its scheduling and its storage. Called by `teach.py`."""

from collections.abc import Mapping

import numpy as np

from fusion_ray.stages.teach import COUNTS
from fusion_ray.store import Artifact, Json


class NullShards:
    """In the place of stages.teach.TeachShards: commits an empty unit for every shard."""

    def __init__(self, out: Artifact, *unused: object, **settings: object) -> None:
        self._out = out

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        name = str(batch["shard"][0])
        info: dict[str, Json] = dict.fromkeys(COUNTS, 1)
        info |= {"rejected": 0, "quarantined": 0, "bits": 1.0, "missing": []}
        self._out.commit_bytes(name, b"", rows=1, info=info)
        nothing = np.array([""])
        return {"shard": batch["shard"], "kind": nothing, "error": nothing, "actor": nothing}
