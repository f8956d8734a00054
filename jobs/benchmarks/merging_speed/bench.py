"""Merges of one benchmark: where models and outputs are, who merges, and every run that was timed. Called by `merge.py`."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from merging_speed.models import PIVOT, SIZES, Size, check_room, read_once
from merging_speed.process import Finished
from merging_speed.settings import SETTINGS, write
from merging_speed.sides import Side, fusion_ray, read_and_write
from speed.line import progress

MB = 1e6


@dataclass(frozen=True)
class Bench:
    """What is given, and the runs that were timed."""

    work: Path
    out: Path
    peer: Side
    ours: Side = field(default_factory=fusion_ray)
    repeats: int = 3
    settings: tuple[str, ...] = tuple(SETTINGS)
    sizes: Sequence[Size] = SIZES[:2]
    timed: list[Finished] = field(default_factory=list)

    def chosen(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.settings]

    def config(self, name: str, models: Mapping[str, Path]) -> Path:
        folder = models[PIVOT].parent.name
        return write(SETTINGS[name], models, self.work / "merges" / f"{folder}-{len(models)}-{name}.yml")

    def merge(self, side: Side, name: str, models: Mapping[str, Path]) -> Finished:
        """One timed merge into `out/SIDE`, which is left there. `ready` first."""
        config = self.config(name, models)
        os.sync()  # what the run before wrote is not this one's to wait for
        done = side.merge(config, self.out / side.name)
        self.timed.append(done)
        progress(f"{name} by {side.name}: {done.seconds:.2f} s, {done.processor:.2f} s of processor time")
        return done

    def floor(self, models: Mapping[str, Path]) -> Finished:
        os.sync()
        done = read_and_write(models, self.out / "floor")
        self.timed.append(done)
        progress(f"floor: {done.seconds:.2f} s, {done.processor:.2f} s of processor time")
        return done

    def ready(self, models: Mapping[str, Path]) -> None:
        """No output of another run is there, and the models are in the page cache."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        check_room(self.out, 2 * (models[PIVOT] / "model.safetensors").stat().st_size)
        read_once(list(models.values()))

    def warm(self, models: Mapping[str, Path], names: Sequence[str]) -> None:
        """Everything is compiled, and the program and its libraries are in the page cache."""
        for name in names:
            self.ready(models)
            self.ours.merge(self.config(name, models), self.out / self.ours.name)

    def watched(self, side: Side, name: str, models: Mapping[str, Path], *options: str) -> Finished:
        """A merge whose memory is looked at; its time counts for nothing."""
        self.ready(models)
        folder = models[PIVOT].parent
        done = side.merge(self.config(name, models), self.out / side.name, *options, watch=True, models=folder)
        progress(
            f"{name} of {folder.name} models by {side.name}: {done.peak_private / MB:.0f} MB, {done.seconds:.1f} s"
        )
        return done
