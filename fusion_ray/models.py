"""A model reference made concrete: what it contains (fingerprint) and where it lies on this machine (local folder).

A reference is a local folder, an object-store URL or a hub id with a revision (design.md section 3). Called by graph.py (fingerprints enter the keys)
and by workers (engines want a folder). Imports no torch.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from fusion_ray.config import ConfigError, is_url
from fusion_ray.places import told

# Files that decide what a model says; weights in safetensors only (design.md section 8).
MODEL_SUFFIXES = (".json", ".jinja", ".safetensors", ".model", ".txt", ".py", ".tiktoken")
CARD = "README.md"  # decides nothing, and says the licence


def fingerprint_model(path: str, revision: str | None = None) -> str:
    """sha256 over the names and contents of the files that decide what the model says.

    Raises ConfigError when nothing is there or it is not a model folder.
    """
    if is_url(path):
        with _asked(path):
            fs, root = fsspec.core.url_to_fs(path)
            found_there = [str(name) for name in fs.find(root) if _decides(str(name))]
            files = {name[len(root) + 1 :]: str(fs.checksum(name)) for name in found_there}
        return _digest(_require_config(files, path))
    if os.path.isdir(path):
        root_folder = Path(path)
        found = sorted(file for file in root_folder.rglob("*") if file.is_file() and _decides(file.name))
        return _digest(_require_config({str(f.relative_to(root_folder)): content_hash(f) for f in found}, path))
    return hashlib.sha256(f"hub:{path}@{_hub_commit(path, revision)}".encode()).hexdigest()


def local_folder(path: str, revision: str | None = None) -> str:
    """A folder on this machine that holds the model; object stores and the hub are downloaded once.

    Raises ConfigError when the reference leads nowhere.
    """
    if os.path.isdir(path):
        return path
    if not is_url(path):
        from huggingface_hub import snapshot_download  # slow to import, needed for hub ids alone

        _hub_commit(path, revision)
        patterns = [*(f"*{suffix}" for suffix in MODEL_SUFFIXES), CARD]
        try:
            return str(snapshot_download(path, revision=revision, allow_patterns=patterns))
        except Exception as error:  # the hub's client has errors of its own kinds
            raise ConfigError(
                f"the model {path!r} could not be downloaded from the hub ({type(error).__name__}: {error}): run again (what is here is kept), or "
                "give a local folder"
            ) from error
    target = Path(tempfile.gettempdir()) / "fusion_ray" / "models" / fingerprint_model(path)[:32]
    with _asked(path):
        fs, root = fsspec.core.url_to_fs(path)
        for name in fs.find(root):
            local = target / str(name)[len(root) + 1 :]
            wanted = _decides(str(name)) or name == f"{root}/{CARD}"
            if not wanted or (local.exists() and local.stat().st_size == fs.size(name)):
                continue
            local.parent.mkdir(parents=True, exist_ok=True)
            temporary = f"{local}.tmp-{os.getpid()}"
            fs.get_file(name, temporary)
            os.replace(temporary, local)
    return str(target)


@contextmanager
def _asked(url: str) -> Iterator[None]:
    """Raises ConfigError where the object store does not answer, or nothing here reads such a URL."""
    try:
        with told(url):
            yield
    except OSError as error:
        raise ConfigError(str(error)) from error


def content_hash(file: Path) -> str:
    """sha256 of a local file; kept in a cache by path, size and time of change, so that large weights are read once."""
    stat = file.stat()
    cache = Path(os.environ.get("FUSION_RAY_CACHE", Path.home() / ".cache" / "fusion_ray")) / "sha256"
    label = f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}"
    entry = cache / hashlib.sha256(label.encode()).hexdigest()
    small = stat.st_size < 1 << 20
    if not small and entry.exists():
        return entry.read_text()
    with open(file, "rb") as handle:
        value = hashlib.file_digest(handle, "sha256").hexdigest()
    if not small:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = entry.with_suffix(f".tmp-{os.getpid()}")
        temporary.write_text(value)
        os.replace(temporary, entry)
    return value


def _decides(name: str) -> bool:
    base = os.path.basename(name)
    return (
        base.endswith(MODEL_SUFFIXES)
        and not base.startswith(".")
        and base not in ("manifest.json", "reused.json")  # of a merge, and how it came about
        and "_units" not in name
    )


def _require_config(files: dict[str, str], path: str) -> dict[str, str]:
    if "config.json" not in files:
        raise ConfigError(
            f"{path} holds no config.json: give a Hugging Face model folder (config, tokenizer, safetensors)"
        )
    return files


def _digest(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _hub_commit(path: str, revision: str | None) -> str:
    """The commit that a hub id and revision name, from the local cache when it is there, else from the hub."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    at = f" at revision {revision!r}" if revision else ""
    cure = "Give a local folder, an object-store URL, or a hub id that you may read"
    try:
        cached = try_to_load_from_cache(path, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent.name
        return str(HfApi().model_info(path, revision=revision).sha)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ConfigError(
            f"there is no model at {path!r}: it is not a folder here, and the hub does not give it{at} ({type(error).__name__}). {cure}"
        ) from error
    except Exception as error:  # no answer: errors of the HTTP library, which changes with the hub's client
        raise ConfigError(
            f"there is no model at {path!r}: it is not a folder here, and the hub cannot be reached to look for it there{at} "
            f"({type(error).__name__}: {error}). {cure}"
        ) from error
