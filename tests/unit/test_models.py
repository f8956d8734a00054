"""Model references: a folder, an object store, the hub's cache as it lies on disk."""

import json
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pytest

from fusion_ray.config import ConfigError
from fusion_ray.models import content_hash, fingerprint_model, local_folder


def write_model(folder: Path, *, word: str = "a") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"word": word}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_fingerprint_is_of_content_not_of_place(tmp_path: Path) -> None:
    first, same, other = (write_model(tmp_path / n, word=w) for n, w in (("x", "a"), ("y", "a"), ("z", "b")))
    assert fingerprint_model(str(first)) == fingerprint_model(str(same)) != fingerprint_model(str(other))
    (same / "README.md").write_text("a card says nothing that a model would")
    assert fingerprint_model(str(first)) == fingerprint_model(str(same))
    (same / "chat_template.jinja").write_text("{{ messages }}")
    assert fingerprint_model(str(first)) != fingerprint_model(str(same))


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        fingerprint_model(str(tmp_path))


def test_object_store_is_brought_here_once(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/model"
    fs = fsspec.filesystem("memory")
    for file in write_model(tmp_path / "m").iterdir():
        fs.pipe_file(f"{url}/{file.name}", file.read_bytes())
    folder = Path(local_folder(url))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert local_folder(url) == str(folder)


def test_content_hash_notices_a_change_of_equal_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_RAY_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "large"
    file.write_bytes(bytes(2 << 20))
    before = content_hash(file)
    assert content_hash(file) == before
    assert list((tmp_path / "cache" / "sha256").iterdir())  # kept: large files are read once
    file.write_bytes(b"\1" * (2 << 20))
    assert content_hash(file) != before


HUB = """
import sys
from fusion_ray.models import fingerprint_model, local_folder
print(local_folder("org/tiny"), fingerprint_model("org/tiny"), fingerprint_model("org/tiny", "v1"))
try:
    fingerprint_model("org/absent")
except ValueError as error:
    print(error)
"""


def test_hub_id_is_found_in_the_hubs_own_cache(tmp_path: Path) -> None:
    """In a process of its own: the hub's library reads its environment when it is imported."""
    repo, commit = tmp_path / "hub" / "models--org--tiny", "0123456789abcdef0123456789abcdef01234567"
    write_model(repo / "snapshots" / commit)
    for ref in ("main", "v1"):
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found, refused = done.stdout.splitlines()[0].split(), done.stdout.splitlines()[1]
    assert found[0] == str(repo / "snapshots" / commit)
    assert found[1] == found[2]  # both names lead to the same commit
    assert "there is no model at 'org/absent'" in refused
