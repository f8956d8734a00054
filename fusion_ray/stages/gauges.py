"""Figures of a stage as Ray metrics, which Ray's Prometheus endpoint serves. Called by the stages, in the process that has the figures."""

from collections.abc import Mapping

from ray.util.metrics import Gauge


class Gauges:
    """One gauge a figure, named `fusion_ray_<stage>_<figure>`, with the artefact's key as its tag."""

    def __init__(self, stage: str, *, key: str) -> None:
        self._stage, self._tags = stage, {"artifact": key[:12]}
        self._gauges: dict[str, Gauge] = {}

    def set(self, figures: Mapping[str, object]) -> None:
        """Numbers are set, all else is left out."""
        for name, value in figures.items():
            if not isinstance(value, int | float):
                continue
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"fusion_ray_{self._stage}_{name}", f"{self._stage}: {name}", ("artifact",))
            self._gauges[name].set(float(value), self._tags)
