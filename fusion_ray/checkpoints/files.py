"""The files of one model folder, on this machine or in an object store, read by ranges of bytes. Called by the reader; safe to use from several threads."""

import mmap
import os
import threading
import weakref
from contextlib import suppress
from typing import Protocol

import fsspec

from fusion_ray.config import is_url
from fusion_ray.places import PlaceError, told


class Files(Protocol):
    """`root` is how the folder is called in messages. Everything raises OSError for what is not there."""

    root: str

    def names(self) -> list[str]:
        """The files right in the folder and below it, relative, sorted."""

    def size(self, name: str) -> int: ...

    def read(self, name: str) -> bytes: ...

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from byte `offset` on; how many bytes there were, fewer at the end of the file."""

    def mapped(self, name: str, offset: int, count: int) -> memoryview | None:
        """These bytes in memory that the system fills when they are looked at; shorter at the end of the file. None where files cannot be mapped.

        A file that is cut off while it is looked at ends the process (SIGBUS).
        """

    def expect(self, name: str, offset: int, count: int) -> None:
        """These bytes of a mapped file will be looked at soon: have them read meanwhile."""


def files_of(folder: str) -> Files:
    """Raises PlaceError for a URL of a kind that nothing here reads."""
    return RemoteFiles(folder) if is_url(folder) else LocalFiles(folder)


def stat_of(path: str) -> os.stat_result:
    """Raises PlaceError for a link that leads nowhere, as in a copy of the hub's cache without its blobs."""
    try:
        return os.stat(path)
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise PlaceError(
                f"cannot read {path}: it is a link to {os.readlink(path)}, which is not there: download the model again, or copy it with what its links lead to"
            ) from error
        raise


class LocalFiles:
    """Each file is opened once, and mapped once; positioned reads need no lock."""

    def __init__(self, folder: str) -> None:
        self.root = str(folder)
        self._descriptors: dict[str, int] = {}
        self._mappings: dict[str, mmap.mmap] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._descriptors)

    def names(self) -> list[str]:
        found = []
        for folder, _, files in os.walk(self.root):
            found += [os.path.relpath(os.path.join(folder, file), self.root) for file in files]
        return sorted(found)

    def size(self, name: str) -> int:
        return stat_of(os.path.join(self.root, name)).st_size

    def read(self, name: str) -> bytes:
        with open(os.path.join(self.root, name), "rb") as file:
            return file.read()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        descriptor = self._descriptor(name)
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if not count:
                break
            done += count
        return done

    def mapped(self, name: str, offset: int, count: int) -> memoryview | None:
        descriptor = self._descriptor(name)
        size = os.fstat(descriptor).st_size
        with self._lock:
            if name not in self._mappings:
                if not size:
                    return memoryview(b"")
                self._mappings[name] = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
            mapping = self._mappings[name]
        return memoryview(mapping)[offset : min(offset + count, size)]

    def expect(self, name: str, offset: int, count: int) -> None:
        with suppress(OSError):  # a hint, which some file systems do not take
            os.posix_fadvise(self._descriptor(name), offset, count, os.POSIX_FADV_WILLNEED)

    def _descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._descriptors:
                self._descriptors[name] = os.open(os.path.join(self.root, name), os.O_RDONLY)
            return self._descriptors[name]


class RemoteFiles:
    """Any fsspec URL; each range is one request."""

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/")
        with told(url):
            self._fs, path = fsspec.core.url_to_fs(self.root)
        self._path = path.rstrip("/")

    def names(self) -> list[str]:
        with told(self.root):
            return sorted(str(name)[len(self._path) + 1 :] for name in self._fs.find(self._path))

    def size(self, name: str) -> int:
        with told(f"{self.root}/{name}"):
            return int(self._fs.size(f"{self._path}/{name}"))

    def read(self, name: str) -> bytes:
        with told(f"{self.root}/{name}"):
            return bytes(self._fs.cat_file(f"{self._path}/{name}"))

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        with told(f"{self.root}/{name}"):
            data = self._fs.cat_file(f"{self._path}/{name}", start=offset, end=offset + len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def mapped(self, name: str, offset: int, count: int) -> memoryview | None:
        return None

    def checksum(self, name: str) -> str:
        """What changes with the file, from its listing."""
        with told(f"{self.root}/{name}"):
            return str(self._fs.checksum(f"{self._path}/{name}"))

    def expect(self, name: str, offset: int, count: int) -> None: ...


def _close(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
