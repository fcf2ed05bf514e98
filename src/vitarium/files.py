"""Atomic writing of files with normal permissions, and locks of run folders."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vitarium.errors import UsageError, VitariumError, WriteError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces `path`, on any error it is removed and `path` is unchanged.

    A missing folder is created. The file gets the permissions of the umask (some writers choose 0600, which other users of a cluster cannot
    read).

    Raises:
        UsageError: `path` exists and is not a regular file (replacing a device or a folder by rename would destroy it).
        WriteError: no space, no permission, read-only disk; the old file is intact.
    """
    path = Path(path)
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise UsageError(f"{path} exists and is not a regular file; choose another path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise write_error(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except Exception as error:
        failure = _failure_of(temporary, error)
        with contextlib.suppress(OSError):
            os.truncate(temporary, 0)  # the writer may keep it open, and with it the room that is measured
        _remove(temporary)
        if failure is None:
            raise
        raise write_error(path, failure) from error
    finally:
        _remove(temporary)


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()


FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a disk, or of a user's share of it, that is full."""
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Numbers of the errors of a place in which nothing may be written."""


def _failure_of(temporary: Path, error: Exception) -> Exception | None:
    """Return the error by which the writing of a temporary file failed, the system's if it is known; None for an error of another kind.

    The writers of torch, safetensors and Pillow do not pass on the number of the system's error; one more write shows it.
    """
    if isinstance(error, VitariumError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        elsewhere = error.filename is not None and Path(os.fsdecode(error.filename)).parent != temporary.parent
        return None if elsewhere and error.errno not in FULL else error
    if number := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors', of Rust
        return OSError(int(number[1]), os.strerror(int(number[1])))
    try:
        with open(temporary, "ab") as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as found:
        return found
    return error if isinstance(error, OSError) or type(error).__name__ == "SafetensorError" else None


def write_error(path: str | os.PathLike[str], error: BaseException) -> WriteError:
    """Return the error of a file that cannot be written: with the reason, the room on its disk, and what to do.

    Args:
        path: the file, or its folder.
        error: of the writer.
    """
    path, code = Path(path), getattr(error, "errno", None)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    reason = os.strerror(code) if code is not None else first
    advice = "choose another place"
    if code in FULL:
        folder = next((place for place in path.absolute().parents if place.is_dir()), Path.cwd())
        advice = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free in {folder}; make room there, or choose another place"
    elif code in READ_ONLY:
        advice = "choose a place where you may write"
    return WriteError(f"cannot write {path}: {reason}; {advice}", code, reason)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading. A named pipe, on which reading would wait for a writer, a socket or a device is refused.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise NotRegular(errno.EINVAL, "a named pipe, a socket or a device, not a file", os.fspath(path))
    return file


def _open_at_once(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # opening a named pipe waits, too


class NotRegular(OSError):
    """A named pipe, a socket or a device where a file is expected."""


MODEL_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
"""Endings of files of weights."""


def is_model_file(source: Any) -> bool:
    """Return whether a model is given as a file: an existing file, or a path with the ending of one; False for a name or a module."""
    if not isinstance(source, str | os.PathLike):
        return False
    text = os.fspath(source)
    return text.endswith(MODEL_ENDINGS) or Path(text).is_file()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically.

    Bytes of file names that are not UTF-8, which Python holds as lone surrogates, are written as "\\udce9". In JSON this reads back as the
    same name.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON atomically, indented, with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def cache_folder() -> Path:
    """Return the user's folder of things that can be found again: $VITARIUM_CACHE, else vitarium in the system's folder of caches."""
    given = os.environ.get("VITARIUM_CACHE")
    place = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(given) if given else Path(place, "vitarium")


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Lock a folder for one run; a second run gets an error with the process and host of the first.

    The lock is the operating system's (filelock), so that it is released when a run is killed; a file beside it names the holder.

    Raises:
        UsageError: another process holds the folder.
        WriteError: nothing can be written into it.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    holder = folder / ".lock.holder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        name = holder.read_text(encoding="utf-8").strip() if holder.exists() else "unknown process"
        raise UsageError(f"{folder} is in use by another run ({name}); choose another folder or wait") from None
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


MARK = "vitarium"
"""Word in the content of every file that a command writes, by which the next call recognises it."""

_LOOKED_AT = 2**20  # bytes at the beginning and at the end of a file


def check_output(*paths: str | os.PathLike[str] | None) -> None:
    """Check, before the work, that files may and can be written: each is missing, a folder, or was written by a command before, and see
    `check_writable`. The rule of all commands.

    Raises:
        UsageError: a path is an image, a model or another file that no command has written; nothing is replaced.
        WriteError: the folder is read-only, or a permission is missing.
    """
    for path in paths:
        if path is not None and os.path.isfile(path) and not written_by_us(path):
            raise UsageError(
                f"{path} exists and was not written by vitarium, so it is not replaced; choose another output, or remove the file first"
            )
    check_writable(*paths)


def check_writable(*paths: str | os.PathLike[str] | None) -> None:
    """Check that files can be made in the folders of paths, or where a folder is missing, in the first one above it that exists.

    A temporary file shows it: os.access does not see every disk that is mounted read-only, nor the permissions of a network.

    Raises:
        WriteError: one cannot.
    """
    tried: set[Path] = set()
    for path in [Path(path) for path in paths if path is not None]:
        folder = next((place for place in (path.absolute(), *path.absolute().parents) if place.is_dir()), None)
        if folder is None or folder in tried:
            continue
        tried.add(folder)
        try:
            handle, name = tempfile.mkstemp(dir=folder, prefix=".vitarium.", suffix=".tmp")
        except OSError as error:
            raise write_error(path, error) from error
        os.close(handle)
        _remove(Path(name))


def written_by_us(path: str | os.PathLike[str]) -> bool:
    """Return whether a command wrote a file: `MARK` in its content, or the form of the results in .json and .csv files."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        content = file.read(_LOOKED_AT)
        if size > _LOOKED_AT:
            file.seek(max(_LOOKED_AT, size - _LOOKED_AT))
            content += file.read()
    if path.suffix.lower() == ".csv":
        first = content.partition(b"\n")[0].rstrip()
        return first.startswith(b"image,") and first.endswith(b",error")
    if path.suffix.lower() == ".json":
        return bool(re.match(rb'(\[\n  )?\{\n +"(image|model|file|index)": ', content)) or content.strip() == b"[]"  # as `write_json` does
    return MARK.encode() in content


def save_image(image: Any, path: str | os.PathLike[str], format: str = "png") -> None:
    """Write an image atomically, with `MARK` in its metadata.

    Args:
        image: a PIL image.
        path: file to write.
        format: "png", "jpeg" or "webp".

    Raises:
        UsageError: see `check_output`.
        OSError: it cannot be written.
    """
    from PIL import Image, PngImagePlugin

    check_output(path)
    options: dict[str, Any]
    if format == "png":
        text = PngImagePlugin.PngInfo()
        text.add_text("Software", MARK)
        options = {"pnginfo": text}
    elif format == "jpeg":
        options = {"comment": MARK.encode()}
    else:
        exif = Image.Exif()
        exif[0x0131] = MARK  # Software
        options = {"exif": exif}
    with atomic_path(path) as temporary:
        image.save(temporary, format=format, **options)
