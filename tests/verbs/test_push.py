"""Pushing to a stand-in of the hub on this machine, and loading from it."""

import socket

import pytest
import torch

import vitarium
from tests.verbs.hub_server import running_hub
from vitarium.catalog.record import DataRecord, RunRecord, Training
from vitarium.errors import CheckpointError, UsageError
from vitarium.reports.card import CARD_MARK


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    with running_hub() as one:
        monkeypatch.setattr(constants, "ENDPOINT", one.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", one.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield one


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    model = vitarium.create_model("swin_pico", num_classes=3)
    model.labels = ["ant", "bee", "cat"]
    path = tmp_path_factory.mktemp("push") / "small.safetensors"
    vitarium.save(model, path)
    return path


def test_what_is_pushed_is_loaded_back(hub, file, tmp_path, capsys):
    done = vitarium.push(file, "me/bees", license="mit", private=True, message="first")
    assert set(hub.repositories["me/bees"]) == {"model.safetensors", "README.md"}
    assert hub.repositories["me/bees"]["model.safetensors"] == file.read_bytes()
    text = hub.repositories["me/bees"]["README.md"].decode()
    assert text == vitarium.card(file, license="mit", repository="me/bees")
    assert "vitarium.load('hf:me/bees', fetch=True)" in text
    assert hub.private == {"me/bees"}
    assert hub.messages == ["first"]
    assert done.source == "hf:me/bees"
    assert done.address == f"{hub.url}/me/bees"
    with pytest.raises(CheckpointError, match=r"in no cache.*fetch=True"):
        vitarium.load("hf:me/bees")
    loaded, own, image = vitarium.load("hf:me/bees", fetch=True), vitarium.load(file), torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded(image), own(image))
    assert loaded.labels == ["ant", "bee", "cat"]
    calls = len(hub.calls)
    assert torch.equal(vitarium.load("hf:me/bees")(image), own(image))  # from the cache
    assert len(hub.calls) == calls
    from PIL import Image

    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    rows = vitarium.predict(tmp_path / "red.png", "hf:me/bees", device="cpu").rows
    assert rows == vitarium.predict(tmp_path / "red.png", file, device="cpu").rows
    shown = capsys.readouterr()
    assert "hf_secret" in str(hub.tokens)  # the client's own login
    assert "hf_secret" not in shown.out + shown.err + text + repr(done)


def test_a_file_on_the_hub_runs_as_a_graph_and_is_not_calibrated(hub, file, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from PIL import Image

    monkeypatch.setenv("VITARIUM_CACHE", str(tmp_path / "cache"))
    vitarium.push(file, "me/bees")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    [row] = vitarium.predict(tmp_path / "red.png", "hf:me/bees/model.safetensors", runtime="onnxruntime").rows
    [wanted] = vitarium.predict(tmp_path / "red.png", file, device="cpu").rows
    assert row["predictions"][0]["label"] == wanted["predictions"][0]["label"]
    for source in ("hf:me/bees", "hf:me/bees/model.safetensors"):
        with pytest.raises(UsageError, match="is on the hub"):
            vitarium.evaluate(source, "digits", calibrate=True)


def test_a_readme_of_the_user_stays(hub, file):
    hub.repositories["me/bees"] = {"README.md": b"# My bees, made with vitarium\n"}
    done = vitarium.push(file, "me/bees")
    assert hub.repositories["me/bees"]["README.md"] == b"# My bees, made with vitarium\n"
    assert hub.repositories["me/bees"]["model.safetensors"] == file.read_bytes()
    assert "not replaced" in done.notes[0]
    hub.repositories["me/bees"]["README.md"] = f"{CARD_MARK}\nold".encode()
    assert vitarium.push(file, "me/bees").notes == []
    assert hub.repositories["me/bees"]["README.md"] != f"{CARD_MARK}\nold".encode()


@pytest.mark.parametrize("status", [401, 403])
def test_without_the_right_to_write(hub, file, status):
    hub.refuse = status
    with pytest.raises(UsageError, match=r"does not let you write me/bees: log in with 'hf auth login'"):
        vitarium.push(file, "me/bees")


def test_a_hub_out_of_reach_is_asked_once(file, monkeypatch, tmp_path):
    from huggingface_hub import constants

    asked = []

    def resolve(host, *_args, **_options):
        asked.append(host)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match=r"cannot reach the hub.*--output FOLDER.*hf upload me/bees FOLDER"):
        vitarium.push(file, "me/bees")
    assert 1 <= len(asked) <= 2  # the client retries 5 times


def test_no_path_of_this_machine_is_pushed(hub, tmp_path):
    model = vitarium.create_model("swin_pico", num_classes=3)
    recipe = {
        "model": "swin_pico",
        "checkpoint": "/home/annika/secret/base.pth",
        "objective": {"teachers": ["C:\\annika\\t.pth", "hf:o/n"]},
    }
    model.training_record = Training(
        data=DataRecord(source="csv:/home/annika/secret/labels.csv,fold=3", name="labels"), run=RunRecord(recipe=recipe, steps=3)
    )
    vitarium.save(model, tmp_path / "m.safetensors")
    vitarium.push(tmp_path / "m.safetensors", "me/paths")
    sent = hub.repositories["me/paths"]
    assert not any(b"secret" in content or b"annika" in content for content in sent.values())
    (tmp_path / "back.safetensors").write_bytes(sent["model.safetensors"])
    record = vitarium.load(tmp_path / "back.safetensors").training_record
    assert record.data.source == "csv:labels.csv,fold=3"
    assert record.run.recipe == {"model": "swin_pico", "checkpoint": "base.pth", "objective": {"teachers": ["t.pth", "hf:o/n"]}}
    assert vitarium.load(tmp_path / "m.safetensors").training_record.data.source.startswith("csv:/home/annika")


def test_a_folder_is_written_and_nothing_is_pushed(hub, file, tmp_path):
    folder = tmp_path / "out"
    done = vitarium.push(file, "me/bees", output=folder)
    assert hub.calls == []
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == file.read_bytes()
    assert done.folder == folder
    assert vitarium.push(file, "me/bees", output=folder).folder == folder  # again
    (folder / "README.md").write_text("mine, made with vitarium")
    with pytest.raises(UsageError, match=r"README.md exists and is no card"):
        vitarium.push(file, "me/bees", output=folder)
    with pytest.raises(UsageError, match=r"is a file; give a folder"):
        vitarium.push(file, "me/bees", output=file)


@pytest.mark.parametrize(
    "name", ["bees", "me/bees/x", "../x", "me/..", "me/", "https://huggingface.co/me/bees", "me/b ees", "me/b\nees", "me/bées"]
)
def test_names_of_another_form(hub, file, name):
    with pytest.raises(UsageError, match="OWNER/NAME"):
        vitarium.push(file, name)
    assert hub.calls == []


def test_files_that_are_no_model_of_ours(hub, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"was not written by vitarium\.save"):
        vitarium.push(tmp_path / "w.pth", "me/bees")
    with pytest.raises(UsageError, match="licence must be an identifier"):
        vitarium.push(tmp_path / "w.pth", "me/bees", license="MIT: do what you like")
    assert hub.calls == []


@pytest.mark.parametrize(("given", "near"), [("apache-2", "apache-2.0"), ("MIT", "mit"), ("foo", "got 'foo'$"), ("", "got ''$")])
def test_a_licence_that_the_hub_does_not_know(hub, file, given, near):
    with pytest.raises(UsageError, match=rf"identifier of the hub, such as apache-2\.0.*{near}"):
        vitarium.push(file, "me/bees", license=given)
    assert hub.calls == []


def test_a_licence_of_ones_own(file, tmp_path):
    done = vitarium.push(file, "me/bees", license="other", output=tmp_path / "out")
    assert "license: other" in (done.folder / "README.md").read_text(encoding="utf-8")
