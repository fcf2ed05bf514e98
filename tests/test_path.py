"""The guide from a folder of images to a server, line by line."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs/guides/path.md").read_text(encoding="utf-8")
BLOCKS = [(kind, text) for kind, text in re.findall(r"```(python|bash)\n(.*?)```", GUIDE, re.DOTALL)]
VITARIUM = (sys.executable, "-m", "vitarium")


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = shlex.split(line)
    assert command[0] == "vitarium"
    done = subprocess.run([*VITARIUM, *command[1:]], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.timeout(600)
def test_every_line_of_the_path_runs(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("fastapi")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITARIUM_CACHE", str(tmp_path / "cache"))
    served: subprocess.Popen[str] | None = None
    try:
        for kind, text in BLOCKS:
            if kind == "python":
                exec(compile(text, "path.md", "exec"), {})
                continue
            for line in text.strip().splitlines():
                if line.startswith("vitarium serve"):
                    served, address = start(line, tmp_path)
                elif line.startswith("curl"):
                    assert b'"label"' in ask(line, address)
                else:
                    run(line, tmp_path)
        assert served is not None, "the guide no longer starts a server"
        assert (tmp_path / "runs/first/report.html").stat().st_size > 10_000
        assert (tmp_path / "answers.csv").read_text().count("\n") > 10
        assert list((tmp_path / "why").glob("*.png"))
        assert (tmp_path / "small.safetensors").stat().st_size < (tmp_path / "runs/longer/model.safetensors").stat().st_size
    finally:
        if served is not None:
            served.terminate()
            served.wait(30)


def start(line: str, folder: Path) -> tuple[subprocess.Popen[str], str]:
    """Start the guide's server on a free port; return it and its address."""
    command = [*VITARIUM, *shlex.split(re.sub(r"--port \d+", "--port 0", line))[1:]]
    log = folder / "serve.log"
    served = subprocess.Popen(command, cwd=folder, stdout=log.open("w"), stderr=subprocess.STDOUT, text=True)
    for _ in range(600):
        if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
            return served, found[0]
        assert served.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def ask(line: str, address: str) -> bytes:
    """Send what the guide sends by curl."""
    file, url = re.fullmatch(r"curl --data-binary @(\S+) http://127.0.0.1:8000(\S+)", line).groups()
    request = urllib.request.Request(address + url, data=Path(file).read_bytes(), method="POST")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()
