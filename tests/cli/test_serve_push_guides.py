"""The lines of the guides to serving and pushing run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vitarium
from tests.verbs.hub_server import running_hub

GUIDES = Path(__file__).parents[2] / "docs/guides"


def blocks_of(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (GUIDES / name).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("curl") is None, reason="a shell with curl")
def test_the_guide_to_serving(tmp_path, monkeypatch):
    pytest.importorskip("fastapi")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks_of("serve.md", "python"):
        exec(compile(block, "serve.md", "exec"), scope)
    start, requests, others = blocks_of("serve.md", "bash")
    assert start.split()[:2] == ["vitarium", "serve"]
    command = [sys.executable, "-m", *start.replace("8000", "0").split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        address = process.stderr.readline().split()[0]
        lines = [line.replace("http://127.0.0.1:8000", address) for line in requests.splitlines()]
        answers = [subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout for line in lines]
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert [len(re.findall('"predictions"', answer)) for answer in answers] == [1, 2, 0, 0, 0]
    assert "--token-file" in others
    for route in re.findall(r"`(?:GET|POST) (/\w*)", (GUIDES / "serve.md").read_text(encoding="utf-8")):
        assert route in scope["app"].state.vitarium.routes | {"/openapi"}


def test_the_guide_to_pushing(tmp_path, monkeypatch, run):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        *first, last = blocks_of("push.md", "python")
        scope: dict[str, object] = {}
        for block in first:
            exec(compile(block, "push.md", "exec"), scope)
        assert sorted(path.name for path in Path("out").iterdir()) == ["README.md", "model.safetensors"]
        login, predict = blocks_of("push.md", "bash")
        vitarium.open_data("digits").val[0][0].save("digit.png")
        for line in (login.splitlines()[1], predict.strip()):
            done = run(*line.split()[1:])
            assert done.code == 0, done.err
        exec(compile(last, "push.md", "exec"), scope)
        assert scope["model"].labels == scope["trained"].model.labels
