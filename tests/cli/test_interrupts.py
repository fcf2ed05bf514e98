"""SIGINT and SIGTERM at any time of a command: exit code 130, a message, no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def python(code: str, folder, **values) -> subprocess.CompletedProcess:
    text = "import os, signal, sys, time\nfrom vitarium.cli.interrupts import interruptible\n" + code.format(**values)
    return subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, timeout=60)


@BOTH
def test_inside_a_command(tmp_path, number):
    done = python("with interruptible():\n    os.kill(os.getpid(), {number})\n    time.sleep(9)", tmp_path, number=int(number))
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@BOTH
def test_during_an_import_it_ends_at_once_and_no_module_is_left_half_initialised(tmp_path, number):
    """Also where the importing code swallows every exception, as compiled modules do."""
    (tmp_path / "slow.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(9)\n")
    code = "with interruptible():\n    try:\n        import slow\n    except BaseException:\n        pass\n    print('went on')"
    done = python("sys.path.insert(0, '.')\n" + code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@BOTH
def test_after_the_result_it_changes_nothing(tmp_path, number):
    done = python("with interruptible():\n    print('result')\nos.kill(os.getpid(), {number})", tmp_path, number=int(number))
    assert (done.returncode, done.stdout, done.stderr) == (0, "result\n", "")


@BOTH
def test_while_a_command_prints_its_last_words_the_first_is_ignored_and_the_second_ends_it(tmp_path, number):
    code = (
        "from vitarium.cli.interrupts import settle\n"
        "with interruptible():\n"
        "    settle()\n"
        "    os.kill(os.getpid(), {number})\n"
        "    print('result', flush=True)\n"
        "    os.kill(os.getpid(), {number})\n"
        "    time.sleep(9)\n"
    )
    done = python(code, tmp_path, number=int(number))
    assert (done.returncode, done.stdout, done.stderr) == (130, "result\n", "interrupted\n")


def test_the_handlers_are_there_before_anything_else_is_imported(tmp_path):
    code = "import vitarium.cli\nprint([name for name in ('typer', 'rich', 'torch', 'vitarium.cli.app') if name in sys.modules])"
    assert python(code, tmp_path).stdout == "[]\n"


@BOTH
def test_a_whole_command(tmp_path, number):
    """A signal that comes while the command runs, after its imports."""
    code = (
        "sys.argv = ['vitarium', 'models', '--json']\n"
        "import vitarium.cli.models as command\n"
        "command.find_models = lambda *_, **__: os.kill(os.getpid(), {number}) or time.sleep(9)\n"
        "import vitarium.catalog.search as search\n"
        "search.find_models = command.find_models\n"
        "from vitarium.cli import main\n"
        "main()\n"
    )
    done = python(code, tmp_path, number=int(number))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
