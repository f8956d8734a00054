"""Everything that `fusion-ray merge` refuses, with its whole message and its exit code, and that nothing is left behind of it."""

import errno
import json
import math
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusion_ray import merge_command
from fusion_ray.config import ConfigError
from fusion_ray.merge_command import read_bytes
from tests.folders import moved, random_tensors, write_model
from tests.merges import alone, command, is_whole, merge, snapshot, tensors_in, varm_of, write_merge, write_models

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
Tensors = dict[str, torch.Tensor]
SMALL = ("--no-check", "--max-shard-size", "20KB", "--max-bytes-in-flight", "4MB")
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: Patch) -> None:
    alone(tmp_path, monkeypatch)


def refused(capsys: Capture, path: Path, *, code: int, says: str, options: tuple[str, ...] = ()) -> None:
    """The command's whole message; `OUT` and `HERE` stand for the output folder and the test's folder."""
    out = path.parent / "out"
    found, said, err = command(capsys, path, out, *SMALL, *options)
    assert (found, said) == (code, "")
    assert err == f"error: {says}\n".replace("OUT", str(out)).replace("HERE", str(path.parent))
    assert not out.exists(), "something is left behind"


# models


def test_a_truncated_file(tmp_path: Path, capsys: Capture) -> None:
    write_models(tmp_path, "base", "a")
    file = tmp_path / "a" / "model.safetensors"
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    refused(
        capsys,
        varm_of(tmp_path, "a"),
        code=1,
        says=f"model 'a': HERE/a/model.safetensors is truncated or damaged: {whole - 100} bytes, its header says {whole}; it ends within tensor "
        "'model.layers.1.self_attn.q_proj.weight': download or export it again",
    )
    file.write_bytes(b"version https://git-lfs")
    refused(
        capsys,
        varm_of(tmp_path, "a"),
        code=1,
        says=f"model 'a': HERE/a/model.safetensors is truncated or not a safetensors file (23 bytes, header of {int.from_bytes(b'version ', 'little')}): "
        "download or export it again",
    )


def test_a_missing_shard(tmp_path: Path, capsys: Capture) -> None:
    tensors = random_tensors(0)
    write_model(tmp_path / "base", tensors)
    write_model(tmp_path / "a", moved(tensors, 1), shards=3)
    (tmp_path / "a" / "model-00002-of-00003.safetensors").unlink()
    refused(
        capsys,
        varm_of(tmp_path, "a"),
        code=1,
        says="model 'a': the shard model-00002-of-00003.safetensors that HERE/a/model.safetensors.index.json lists is missing: download or export it again",
    )


def test_another_architecture(tmp_path: Path, capsys: Capture) -> None:
    write_models(tmp_path, "base")
    write_model(tmp_path / "a", random_tensors(1, rows=300, width=32), model_type="qwen3")
    refused(
        capsys,
        varm_of(tmp_path, "a"),
        code=1,
        says="model 'a': `model_type` in HERE/a/config.json is \"qwen3\", the pivot's (model 'base', HERE/base/config.json) is \"llama\": only models of one "
        "architecture merge; make every target from this pivot, or mend the config.json that is wrong",
    )


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def put(value: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        tensors[UP].view(-1)[77] = value
        return tensors

    return change


SHAPES = "only models of one size merge; make every target from this pivot"
FAMILIES = "only models of one architecture merge; export them by one class, with adapters merged in and no heads added"
BROKEN = "its training diverged or its export failed; train or export it again"
CASES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "vocabulary rows": (
        lambda tensors: tensors | {"model.embed_tokens.weight": torch.randn(304, 32).bfloat16()},
        "model 'b': tensor 'model.embed_tokens.weight' in HERE/b/model.safetensors has 304 vocabulary rows, the pivot's has 300: merging neither adds nor "
        "drops tokens. Train the target on the pivot's own tokenizer, or bring its embeddings back with model.resize_token_embeddings(300) if the rows past "
        "the pivot's are padding",
    ),
    "shape": (
        lambda tensors: tensors | {UP: torch.randn(32, 96).bfloat16()},
        f"model 'b': tensor '{UP}' in HERE/b/model.safetensors has the shape [32, 96], the pivot's [96, 32]: {SHAPES}",
    ),
    "extra tensor": (
        lambda tensors: tensors | {"value_head.weight": torch.randn(4)},
        f"model 'a' has no tensor 'value_head.weight', and model 'b' has it (1 such in all): {FAMILIES}",
    ),
    "missing tensor": (
        without(UP, "model.norm.weight"),
        f"model 'b' has no tensor '{UP}', and model 'a' has it (2 such in all): {FAMILIES}",
    ),
    "NaN": (
        put(math.nan),
        f"model 'b': tensor '{UP}' in HERE/b/model.safetensors holds NaN or infinite values: {BROKEN}",
    ),
    "infinity": (
        put(-math.inf),
        f"model 'b': tensor '{UP}' in HERE/b/model.safetensors holds NaN or infinite values: {BROKEN}",
    ),
    "integers": (
        lambda tensors: tensors | {UP: torch.ones(96, 32, dtype=torch.int8)},
        f"model 'b': tensor '{UP}' in HERE/b/model.safetensors is I8, the pivot's BF16: export both in one floating type",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_target_that_differs(tmp_path: Path, capsys: Capture, case: str) -> None:
    write_models(tmp_path, "base", "a", "b")
    change, says = CASES[case]
    write_model(tmp_path / "b", change(moved(random_tensors(0, rows=300, width=32), 2)))
    refused(capsys, varm_of(tmp_path, "a", "b"), code=1, says=says)


def test_a_base_with_nan_is_named_and_not_its_targets(tmp_path: Path, capsys: Capture) -> None:
    write_models(tmp_path, "base", "a")
    write_model(tmp_path / "base", put(math.nan)(random_tensors(0, rows=300, width=32)))
    refused(
        capsys,
        varm_of(tmp_path, "a"),
        code=1,
        says=f"model 'base': tensor '{UP}' in HERE/base/model.safetensors holds NaN or infinite values: {BROKEN}",
    )


def test_a_model_that_is_not_there(tmp_path: Path, capsys: Capture) -> None:
    write_models(tmp_path, "base")
    (tmp_path / "a").mkdir()
    refused(
        capsys,
        varm_of(tmp_path, "a"),
        code=1,
        says="model 'a': cannot read HERE/a/config.json: No such file or directory; give a Hugging Face model folder",
    )
    refused(
        capsys,
        varm_of(tmp_path, "b/c/d"),
        code=2,
        says="`models.0.model`: there is no model at 'HERE/b/c/d': it is not a folder here, and the hub does not give it (HFValidationError). Give a local "
        "folder, an object-store URL, or a hub id that you may read",
    )


def test_a_misspelt_folder_while_the_hub_cannot_be_reached(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    class NoAnswerError(Exception):  # the HTTP library's, whichever the hub's client uses
        pass

    def unreachable(*_: object, **__: object) -> None:
        raise NoAnswerError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    write_models(tmp_path, "base", "a")
    says = (
        "`{}`: there is no model at 'trget1': it is not a folder here, and the hub cannot be reached to look for it there (NoAnswerError: [Errno -2] Name or "
        "service not known). Give a local folder, an object-store URL, or a hub id that you may read"
    )
    refused(capsys, varm_of(tmp_path, "a", "trget1"), code=2, says=says.format("models.1.model"))
    path = write_merge(tmp_path / "m.yml", "varm", {"a": {}}, base_model="trget1")
    refused(capsys, path, code=2, says=says.format("base_model"))
    path = write_merge(tmp_path / "m.yml", "varm", {"a": {}}, base_model="base", tokenizer_source="trget1")
    refused(capsys, path, code=2, says=says.format("tokenizer"))


URLS = (
    "give the URL of a model folder that this machine may read, such as s3://bucket/model (credentials come from the environment), or a folder of this "
    "machine"
)


def test_a_url_that_leads_nowhere(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    write_models(tmp_path, "base", "a")
    says = f"`models.0.model`: cannot read foo://x (ValueError: Protocol not known: foo): {URLS}"
    refused(capsys, varm_of(tmp_path, "foo://x", "a"), code=2, says=says)

    class NoCredentialsError(Exception):
        pass

    def refuse(*_: object, **__: object) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.find", refuse)
    says = f"`models.1.model`: cannot read memory://x/y (NoCredentialsError: Unable to locate credentials): {URLS}"
    refused(capsys, varm_of(tmp_path, "a", "memory://x/y"), code=2, says=says)


def test_a_link_that_leads_nowhere(tmp_path: Path, capsys: Capture) -> None:
    write_models(tmp_path, "base", "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / "model.safetensors").symlink_to("../blobs/0123")
    refused(
        capsys,
        varm_of(tmp_path, "a"),
        code=2,
        says="`models.0.model`: cannot read HERE/a/model.safetensors: it is a link to ../blobs/0123, which is not there: download the model again, or copy it "
        "with what its links lead to",
    )


def test_an_error_of_any_kind_leaves_nothing(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    write_models(tmp_path, "base", "a")

    def breaks(*_: object, **__: object) -> None:
        raise AttributeError("a mistake of the program")

    monkeypatch.setattr(merge_command, "run_merge", breaks)
    code, _, err = command(capsys, varm_of(tmp_path, "a"), tmp_path / "out", *SMALL)
    assert (code, "a mistake of the program" in err) == (1, True)
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_not_read(tmp_path: Path, capsys: Capture) -> None:
    write_models(tmp_path, "base", "a")
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "pytorch_model.bin")
    refused(
        capsys,
        varm_of(tmp_path, "a"),
        code=1,
        says="model 'a': HERE/a holds neither model.safetensors nor model.safetensors.index.json (it has pytorch_model.bin: convert to safetensors, pickled "
        "weights are never loaded)",
    )


# the merge file


def test_a_method_s_typo(tmp_path: Path, capsys: Capture) -> None:
    write_models(tmp_path, "base", "a")
    path = write_merge(tmp_path / "m.yml", "dare_tie", {"a": {}}, base_model="base")
    refused(capsys, path, code=2, says="`merge_method`: unknown merge method 'dare_tie': did you mean 'dare_ties'?")


@pytest.mark.parametrize(
    ("method", "models", "keys", "says"),
    [
        (
            "slerp",
            ("a", "b", "c"),
            {"base_model": "base", "parameters": {"t": 0.5}},
            "`models`: the merge method 'slerp' takes one model besides the base, and 3 are given: take multislerp or karcher",
        ),
        (
            "karcher",
            ("a",),
            {},
            "`models`: the merge method 'karcher' takes at least 2 models, and 1 are given: give more models or take another method",
        ),
        (
            "model_stock",
            ("base", "a"),
            {"base_model": "base"},
            "`models`: the merge method 'model_stock' takes at least 2 models besides the base, and 1 are given: give more models or take another method",
        ),
        (
            "ties",
            ("a", "b"),
            {"parameters": {"weight": 1}},
            "missing key `base_model`: the merge method 'ties' needs a base, the model that the others were made from",
        ),
        (
            "ties",
            ("a", "b"),
            {"base_model": "base"},
            "missing key `models.0.parameters.weight`, or `parameters.weight` for all: the merge method 'ties' needs it: one number for all models or one "
            "each (the FuseChat paper's is 0.3)",
        ),
        (
            "linear",
            ("a", "b"),
            {"parameters": {"densty": 1}},
            "`parameters.densty`: the merge method 'linear' takes weight and normalize, not `densty`: remove that key",
        ),
    ],
)
def test_models_and_settings_that_a_method_does_not_take(
    tmp_path: Path, capsys: Capture, method: str, models: tuple[str, ...], keys: dict[str, object], says: str
) -> None:
    write_models(tmp_path, "base", "a", "b", "c")
    refused(capsys, write_merge(tmp_path / "m.yml", method, {name: {} for name in models}, **keys), code=2, says=says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read the merge file 'HERE/m.yml': No such file or directory; give the path of a YAML file such as jobs/configs/merge/fusechat_sce.yml"),
        (
            b"merge_method: l\xefn\xe9aire",
            "cannot read the merge file 'HERE/m.yml': 'utf-8' codec can't decode byte 0xef in position 15: invalid continuation byte; give the path of a YAML "
            "file such as jobs/configs/merge/fusechat_sce.yml",
        ),
        (b"- merge_method", "HERE/m.yml must hold a mapping with the keys "),
        (b"", "HERE/m.yml must hold a mapping with the keys "),
        (b"merge_method: [linear", "HERE/m.yml is not valid YAML: while parsing a flow sequence"),
    ],
    ids=["missing", "not UTF-8", "a list", "empty", "not YAML"],
)  # fmt: skip
def test_an_unreadable_merge_file(tmp_path: Path, capsys: Capture, content: bytes | None, says: str) -> None:
    path, out = tmp_path / "m.yml", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    code, _, err = command(capsys, path, out)
    assert code == 2
    assert err.startswith(f"error: {says}".replace("HERE", str(tmp_path)))
    assert not out.exists()


def test_a_folder_is_no_merge_file(tmp_path: Path, capsys: Capture) -> None:
    code, _, err = command(capsys, tmp_path, tmp_path / "out")
    assert code == 2
    assert err.startswith(
        f"error: cannot read the merge file '{tmp_path}': Is a directory; give the path of a YAML file"
    )


# numbers of bytes


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("256MB", 256_000_000), ("1.5gb", 1_500_000_000), (" 20 KB ", 20_000), ("4096", 4096), ("7B", 7), ("2T", 2 * 10**12), ("3m", 3_000_000)],
)  # fmt: skip
def test_numbers_of_bytes(text: str, bytes_: int) -> None:
    assert read_bytes(text) == bytes_


@pytest.mark.parametrize("text", ["12XB", "", "MB", "-1GB", "0", "0GB", "inf", "nan", "1e400", "1,5GB", "1GiB", "5 5"])
def test_what_is_no_number_of_bytes(tmp_path: Path, capsys: Capture, text: str) -> None:
    with pytest.raises(ConfigError, match="is not a number of bytes"):
        read_bytes(text)
    write_models(tmp_path, "base", "a")
    for option in ("--max-bytes-in-flight", "--max-shard-size"):
        refused(
            capsys,
            varm_of(tmp_path, "a"),
            code=2,
            says=f"{text!r} is not a number of bytes: give for example 256MB or 2GB",
            options=(f"{option}={text}",),
        )


def test_a_bound_that_holds_no_block(tmp_path: Path, capsys: Capture) -> None:
    write_models(tmp_path, "base", "a")
    out = tmp_path / "out"
    code, _, err = command(capsys, varm_of(tmp_path, "a"), out, "--max-bytes-in-flight", "10KB", "--workers", "1")
    assert code == 1
    assert err.startswith("error: max_bytes_in_flight is 10000: merging 2 models in 1 thread takes at least ")
    assert err.endswith(
        ": raise it (merge.max_bytes_in_flight of a run, --max-bytes-in-flight of the command `merge`), or merge in fewer threads\n"
    )
    assert not out.exists()


# the disk


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    write_models(tmp_path, "base", "a")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 0, 1_000_000))
    refused(
        capsys,
        varm_of(tmp_path, "a"),
        code=1,
        says="OUT: the merge needs 67 MB and 1 MB are free: make room or choose another place",
    )


def test_a_disk_that_fills_up_midway(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    """The folder and the reason are named, no half shard stays, and with room again the whole ones are not made again."""
    write_models(tmp_path, "base", "a")
    path, out = varm_of(tmp_path, "a", dtype="float32"), tmp_path / "out"
    pwrite, written = os.pwrite, 0

    def fills_up(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", fills_up)
    code, said, err = command(capsys, path, out, *SMALL)
    assert (code, said) == (1, "")
    assert err == (
        f"error: cannot write model-00003-of-00004.safetensors in {out}: No space left on device. Files that are whole are kept: free space or fix "
        "permissions and run again\n"
    )
    shards = {file.name for file in out.glob("model*")}
    assert shards == {"model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"}
    before = snapshot(out)
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert command(capsys, path, out, *SMALL)[0] == 0
    assert is_whole(out)
    assert {name: stamp for name, stamp in snapshot(out).items() if name in shards} == {
        name: before[name] for name in shards
    }


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    write_models(tmp_path, "base", "a")
    path = varm_of(tmp_path, "a")
    (tmp_path / "file").write_text("")
    code, _, err = command(capsys, path, tmp_path / "file" / "out", *SMALL)
    assert (code, err) == (1, f"error: cannot make the folder {tmp_path}/file/out: Not a directory: give another, or fix permissions\n")  # fmt: skip

    # As root, who runs tests in containers, may write everywhere, the refusals are played.
    def read_only(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    says = "cannot make the folder OUT: Permission denied: give another, or fix permissions"
    with monkeypatch.context() as patched:
        patched.setattr("fusion_ray.merge_folder.os.makedirs", read_only)
        refused(capsys, path, code=1, says=says)
    with monkeypatch.context() as patched:
        patched.setattr("fusion_ray.store._replacing", read_only)
        refused(
            capsys,
            path,
            code=1,
            says="cannot write OUT/merge.json: Permission denied. What was committed before is kept: free space or fix permissions (or write "
            "elsewhere: a run writes to run.storage) and run again",
        )


def test_values_that_leave_the_output_s_type_and_another_try(tmp_path: Path, capsys: Capture) -> None:
    """Found in the second pass; the mended file needs no --overwrite."""
    write_models(tmp_path, "base", "a")
    write_model(tmp_path / "a", put(1e6)(moved(random_tensors(0, rows=300, width=32), 1)))
    says = f"tensor '{UP}': the merged values leave the range of F16: write float32 or bfloat16 (`out_dtype` of a merge file, `merge.dtype` of a run)"
    refused(capsys, varm_of(tmp_path, "a", out_dtype="float16"), code=1, says=says, options=("--max-shard-size", "5GB"))
    assert command(capsys, varm_of(tmp_path, "a", out_dtype="bfloat16"), tmp_path / "out", *SMALL)[0] == 0
    assert is_whole(tmp_path / "out")


def test_what_the_reports_hold_is_json_whatever_the_models(tmp_path: Path) -> None:
    """Differences so large that their squares leave float32, and none at all."""
    base = random_tensors(0, dtype=torch.float32)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "a", {name: tensor.clone() for name, tensor in base.items()})
    far = {name: tensor.clone() for name, tensor in base.items()}
    far[UP][0, 0] = 3e38
    write_model(tmp_path / "b", far)
    merge(varm_of(tmp_path, "a", "b"), tmp_path / "out")
    text = (tmp_path / "out" / "merge_report.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert torch.equal(tensors_in(tmp_path / "out")[UP], far[UP])
