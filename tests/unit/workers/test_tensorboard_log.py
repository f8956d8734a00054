"""TensorBoard's files hold every figure of every step once, also after a resume, on any storage."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fusion_ray.store import Folder
from fusion_ray.workers.tensorboard_log import FOLDER, TensorBoardLog


def figures(step: int, sft: float) -> dict[str, object]:
    return {
        "done": step,
        "total": 9,
        "unit": "steps",
        "epoch": 0,
        "sft": sft,
        "fusion": float("nan"),
        "eta_seconds": 3.0,
    }


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_every_step_is_there_and_only_what_can_be_drawn(tmp_path: Path) -> None:
    log = TensorBoardLog(Folder(str(tmp_path / "out")), scratch=tmp_path)
    for step in (1, 2, 3):
        log.append(figures(step, step / 2))
    log.close()
    assert scalars(tmp_path / "out" / FOLDER) == {
        "train/epoch": [(1, 0.0), (2, 0.0), (3, 0.0)],
        "train/sft": [(1, 0.5), (2, 1.0), (3, 1.5)],
    }


def test_a_resumed_run_hides_the_steps_that_it_repeats(tmp_path: Path) -> None:
    out = Folder(str(tmp_path / "out"))
    for first, last in ((1, 4), (3, 5)):
        log = TensorBoardLog(out, scratch=tmp_path)
        for step in range(first, last + 1):
            log.append(figures(step, 10.0 * first + step))
        log.close()
    assert scalars(tmp_path / "out" / FOLDER)["train/sft"] == [(1, 11.0), (2, 12.0), (3, 33.0), (4, 34.0), (5, 35.0)]


def test_on_an_object_store_the_files_arrive_at_the_end(tmp_path: Path) -> None:
    out = Folder("memory://tensorboard-test/out")
    log = TensorBoardLog(out, scratch=tmp_path)
    log.append(figures(1, 0.5))
    assert not out.names(FOLDER)
    log.close()
    (name,) = out.names(FOLDER)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / Path(name).name).write_bytes(out.read_bytes(name))
    assert scalars(tmp_path / "copy")["train/sft"] == [(1, 0.5)]
    assert not TensorBoardLog(Folder("memory://tensorboard-test/other"), scratch=tmp_path).close()
