"""Atomic writing of files with the permissions of the umask, and locks of run folders."""

import errno
import os
import pickle
import stat
import subprocess
import sys
import tempfile
import textwrap

import pytest

from vitarium.errors import UsageError, WriteError
from vitarium.files import atomic_path, check_output, lock_folder, sha256, write_json, write_text

POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX")


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new folder" / "größe 模型.txt"
    write_text(path, "one")
    write_text(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_json_is_readable(tmp_path):
    write_json(tmp_path / "x.json", {"ä": [1, 2.5]})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "ä": [\n    1,\n    2.5\n  ]\n}\n'


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_no_litter(tmp_path, error):
    write_text(tmp_path / "x", "old")
    with pytest.raises(error), atomic_path(tmp_path / "x") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert (tmp_path / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@POSIX
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        write_text(tmp_path / "x", "")
        assert os.umask(umask) == umask
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode


@POSIX
def test_refuses_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UsageError, match="not a regular file"):
            write_text(path, "")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@POSIX
def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A limit on file sizes stands for the full disk: the write fails half-way."""
    write_text(tmp_path / "x", "old")
    code = """
        import resource, signal, sys
        from vitarium.files import write_text
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            write_text(sys.argv[1], "x" * 1_000_000)
        except OSError as error:
            print(error.strerror)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path / "x"], capture_output=True, text=True)
    assert done.stdout == "File too large\n", done.stderr
    assert (tmp_path / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_one_run_a_folder(tmp_path):
    """Another process is refused with the holder's number; after it, even killed, the folder is free."""
    code = """
        import sys
        from vitarium.files import lock_folder
        with lock_folder(sys.argv[1]):
            print("held", flush=True)
            sys.stdin.read()
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UsageError, match=f"in use by another run \\(process {holder.pid} on .*choose another folder"),
            lock_folder(tmp_path),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with lock_folder(tmp_path):
        pass
    with lock_folder(tmp_path):
        pass


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("writer", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail at x.cc]")])
def test_a_full_disk_is_named_with_its_room(tmp_path, monkeypatch, writer):
    """torch's writer raises a RuntimeError without the system's reason, which one more write finds."""
    write_text(tmp_path / "x", "old")
    monkeypatch.setattr(os, "fsync", failing(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(WriteError) as caught, atomic_path(tmp_path / "x"):
        raise writer
    message = str(caught.value)
    assert message.startswith(f"cannot write {tmp_path / 'x'}: No space left on device; ")
    assert f" MB are free in {tmp_path}; make room there, or choose another place" in message
    assert "enforce" not in message
    assert (caught.value.errno, caught.value.strerror) == (errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.errno) == (message, errno.ENOSPC)


def test_the_number_of_the_error_is_read_from_the_message_of_another_language(tmp_path):
    error = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with (
        pytest.raises(WriteError, match=r"No space left on device; .* MB are free in .*; make room there") as caught,
        atomic_path(tmp_path / "x"),
    ):
        raise error
    assert caught.value.errno == errno.ENOSPC
    assert "serializing" not in str(caught.value)


def test_room_is_measured_without_what_was_written(tmp_path):
    """A writer keeps its file open, as torch's does until the error is gone; a removed file that is open still takes its room."""
    opened = []

    def write() -> None:
        with atomic_path(tmp_path / "x") as temporary:
            opened.append(open(temporary, "wb"))  # noqa: SIM115
            opened[0].write(bytes(100_000))
            opened[0].flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(WriteError):
        write()
    assert os.fstat(opened[0].fileno()).st_size == 0
    opened[0].close()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_place_without_permission_is_named(tmp_path, monkeypatch, code):
    monkeypatch.setattr(tempfile, "mkstemp", failing(OSError(code, os.strerror(code))))
    with pytest.raises(WriteError, match=rf"^cannot write .*x: {os.strerror(code)}; choose a place where you may write$"):
        write_text(tmp_path / "x", "")
    monkeypatch.setattr(os, "open", failing(OSError(code, os.strerror(code))))
    with pytest.raises(WriteError, match="cannot write"), lock_folder(tmp_path / "run"):
        pass


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    check_output(tmp_path / "new/folder/x.json", None, tmp_path)
    assert list(tmp_path.iterdir()) == [], "nothing is left"
    monkeypatch.setattr(tempfile, "mkstemp", failing(OSError(errno.EROFS, os.strerror(errno.EROFS))))
    for path in (tmp_path / "x.json", tmp_path / "new/folder/x.json", tmp_path):
        with pytest.raises(WriteError, match=rf"^cannot write {path}: Read-only file system; choose a place where you may write$"):
            check_output(path)


def test_errors_of_other_files_stay_as_they_are(tmp_path):
    with pytest.raises(PermissionError), atomic_path(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/read.me")
