"""The files of one store: whole files appear under their names or not at all, bytes are read by range.

Local folders take plain system calls; every other path goes through fsspec.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kdkernels.store.errors import StoreError

__all__ = ["Bytes", "Files", "Range", "files_at"]

Bytes = npt.NDArray[np.uint8]

TEMPORARY = ".tmp"
MOST_OPEN_FILES = 128
WHOLE_OBJECTS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"})
"""Protocols whose single upload appears whole or not at all, so that no temporary name is needed."""


class Range(NamedTuple):
    """Bytes ``start`` to ``stop`` of a file of the store."""

    file: str
    start: int
    stop: int


class Files(Protocol):
    """What a store asks of the place where it lies. Names are those of files in the store's folder."""

    def where(self, file: str) -> str:
        """The file as an error should name it."""

    def names(self) -> list[str]:
        """Of all files in the folder; none if there is no folder."""

    def size(self, file: str) -> int:
        """In bytes. FileNotFoundError if there is no such file."""

    def whole(self, file: str, largest: int) -> bytes:
        """A file that may be replaced at any time, as it was at one moment. FileNotFoundError if there is none."""

    def read(self, ranges: Sequence[Range]) -> list[Bytes]:
        """The bytes of each range, all of them or an error, of files that are never replaced."""

    def write(self, file: str, data: bytes | bytearray, *, replace: bool) -> bool:
        """Makes ``file`` appear with this content, durably. False: it exists and is not to be replaced."""

    def remove(self, file: str) -> None:
        """FileNotFoundError if there is no such file."""

    def tidy(self) -> None:
        """Removes what killed writers left half written."""


def files_at(path: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> Files:
    """The files under ``path``, a folder or a URL that fsspec knows."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise TypeError(f"path must be a str or an os.PathLike of str, got {path!r}")
    if text.startswith(("file://", "local://")):
        text = text.split("://", 1)[1]
    if "://" in text or "::" in text:
        return RemoteFiles(text, storage_options or {})
    return LocalFiles(text)


def check_size(files: Files, file: str, size: int, largest: int) -> None:
    if size > largest:
        raise StoreError(files.where(file), f"has {size} bytes, more than the {largest} that it may have")


def short(files: Files, wanted: Range, got: int) -> StoreError:
    return StoreError(
        files.where(wanted.file), f"ends at byte {wanted.start + got}, within the bytes {wanted.start} to {wanted.stop}"
    )


class LocalFiles:
    """A folder of this machine's file system."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self._open: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    def where(self, file: str) -> str:
        return str(self.folder / file)

    def names(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []

    def size(self, file: str) -> int:
        status = os.stat(self.folder / file)
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise StoreError(self.where(file), "is not a regular file")
        return status.st_size

    def whole(self, file: str, largest: int) -> bytes:
        self.size(file)
        with open(self.folder / file, "rb") as handle:
            check_size(self, file, os.fstat(handle.fileno()).st_size, largest)
            return handle.read()

    def read(self, ranges: Sequence[Range]) -> list[Bytes]:
        found = []
        for wanted in ranges:
            handle = self._handle(wanted.file)
            data = np.empty(wanted.stop - wanted.start, np.uint8)
            done = 0
            while done < data.size:
                # Unlike a mapped file, this cannot crash when someone cuts the file short.
                got = os.preadv(handle.fileno(), [data.data[done:]], wanted.start + done)
                if got == 0:
                    raise short(self, wanted, done)
                done += got
            found.append(data)
        return found

    def _handle(self, file: str) -> Any:
        """An open file. One that is forgotten closes when the last thread that reads it lets go of it."""
        handle = self._open.get(file)
        if handle is None:
            self.size(file)
            if len(self._open) >= MOST_OPEN_FILES:
                self._open = {}
            handle = self._open[file] = open(self.folder / file, "rb", buffering=0)  # noqa: SIM115
        return handle

    def write(self, file: str, data: bytes | bytearray, *, replace: bool) -> bool:
        self._make_folder()
        with self._temporary(file) as temporary:
            with open(temporary.fileno(), "wb", closefd=False) as stream:
                stream.write(data)
            os.fsync(temporary.fileno())
            path = Path(temporary.name)
            if replace:
                path.replace(self.folder / file)
            elif not self._link(path, self.folder / file):
                return False
            self._sync(self.folder)
        return True

    def _make_folder(self) -> None:
        missing = []
        folder = self.folder
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        self.folder.mkdir(parents=True, exist_ok=True)
        for made in missing:
            self._sync(made.parent)

    @contextlib.contextmanager
    def _temporary(self, file: str) -> Iterator[Any]:
        """An open file, locked for as long as its writer lives, which is gone afterwards unless it was renamed."""
        while True:
            path = self.folder / f"{file}.{secrets.token_hex(8)}.{socket.gethostname()}{TEMPORARY}"
            with open(path, "xb", buffering=0) as handle:
                self._try_lock(handle)
                if os.fstat(handle.fileno()).st_nlink == 0:  # tidied away between its creation and the lock
                    continue
                try:
                    yield handle
                finally:
                    path.unlink(missing_ok=True)
                return

    @staticmethod
    def _try_lock(handle: Any) -> bool:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (ImportError, OSError):  # held by its writer, or there are no locks here
            return False
        return True

    @staticmethod
    def _link(path: Path, target: Path) -> bool:
        """Renames unless the target exists."""
        try:
            os.link(path, target)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if target.exists():
                return False
            path.rename(target)
        return True

    @staticmethod
    def _sync(folder: Path) -> None:
        """Makes the names in ``folder`` durable, where the file system can."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(handle)

    def remove(self, file: str) -> None:
        (self.folder / file).unlink()
        self._sync(self.folder)
        self._open.pop(file, None)

    def tidy(self) -> None:
        # A lock says nothing of writers on other machines where the file system keeps locks to itself.
        ending = f".{socket.gethostname()}{TEMPORARY}"
        for name in self.names():
            if name.endswith(ending):
                with contextlib.suppress(OSError), open(self.folder / name, "rb", buffering=0) as handle:
                    if self._try_lock(handle):
                        (self.folder / name).unlink()


class RemoteFiles:
    """A folder of any file system that fsspec knows."""

    def __init__(self, url: str, storage_options: dict[str, Any]) -> None:
        self.url = url.rstrip("/")
        self.storage_options = storage_options
        self._connect({})

    def _connect(self, options: dict[str, Any]) -> None:
        import fsspec.core

        self._fs, root = fsspec.core.url_to_fs(self.url, **self.storage_options, **options)
        self._root = root.rstrip("/")
        self._process = os.getpid()

    @property
    def fs(self) -> Any:
        if self._process != os.getpid():  # connections and event loops do not survive a fork
            self._connect({"skip_instance_cache": True})
        return self._fs

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "storage_options": self.storage_options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"], state["storage_options"])  # type: ignore[misc]

    def where(self, file: str) -> str:
        return f"{self.url}/{file}"

    def _path(self, file: str) -> str:
        return f"{self._root}/{file}"

    def names(self) -> list[str]:
        self.fs.invalidate_cache(self._root)
        try:
            return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in self.fs.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []

    def size(self, file: str) -> int:
        return int(self.fs.info(self._path(file))["size"])

    def whole(self, file: str, largest: int) -> bytes:
        check_size(self, file, self.size(file), largest)
        return bytes(self.fs.cat_file(self._path(file)))

    def read(self, ranges: Sequence[Range]) -> list[Bytes]:
        # Some file systems take an empty range for the whole file.
        wanted = [(place, piece) for place, piece in enumerate(ranges) if piece.stop > piece.start]
        found: list[Bytes] = [np.empty(0, np.uint8) for _ in ranges]
        parts = self.fs.cat_ranges(
            [self._path(piece.file) for _, piece in wanted],
            [piece.start for _, piece in wanted],
            [piece.stop for _, piece in wanted],
            on_error="raise",
        )
        for (place, piece), part in zip(wanted, parts, strict=True):
            if len(part) != piece.stop - piece.start:
                raise short(self, piece, len(part))
            found[place] = np.frombuffer(bytearray(part), np.uint8)
        return found

    def write(self, file: str, data: bytes | bytearray, *, replace: bool) -> bool:
        path = self._path(file)
        if not replace and self.fs.exists(path):
            return False
        self.fs.makedirs(self._root, exist_ok=True)
        protocol = self.fs.protocol
        if WHOLE_OBJECTS.intersection((protocol,) if isinstance(protocol, str) else protocol):
            self.fs.pipe_file(path, bytes(data))
            return True
        temporary = f"{path}.{secrets.token_hex(8)}{TEMPORARY}"
        try:
            self.fs.pipe_file(temporary, bytes(data))
            self.fs.mv(temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):
                self.fs.rm_file(temporary)
            raise
        return True

    def remove(self, file: str) -> None:
        self.fs.rm_file(self._path(file))

    def tidy(self) -> None:
        """Nothing: there is no telling whose half-written files these are."""
