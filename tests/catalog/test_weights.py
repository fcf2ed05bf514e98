"""Published weights: lookup in the caches of the hub client and torch, without network access, and error messages."""

import functools
import hashlib
import http.server
import threading

import pytest
import torch
from safetensors.torch import save_file

import vitarium
from tests.catalog.toys import assert_unchanged, officially_named
from vitarium.catalog.weights import fetch, fetch_pretrained, has_published
from vitarium.errors import CheckpointError, UsageError

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch, toy):
    """Empty caches of the hub client and of torch, as they lie on a fresh machine."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def in_hub_cache(tmp_path, repository: str, file: str, state) -> None:
    """Lay a file out as the hub client does: refs/main names a commit, snapshots/<commit> holds its files."""
    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(SHA)
    path = folder / "snapshots" / SHA / file
    path.parent.mkdir(parents=True)
    save_file(state, path) if file.endswith("safetensors") else torch.save(state, path)


def published():
    model = vitarium.create_model("toy_small")
    return model, officially_named(model)


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("hf:someone/toy", "model.safetensors"),
        ("hf:someone/toy", "pytorch_model.bin"),
        ("hf:someone/toy/sub/weights.pth", "sub/weights.pth"),
    ],
)
def test_hub_files_come_from_the_cache(tmp_path, source, file):
    model, state = published()
    in_hub_cache(tmp_path, "someone/toy", file, state)
    assert_unchanged(vitarium.create_model("toy_small", checkpoint=source), model.state_dict())


@pytest.mark.parametrize(("name", "options"), [("toy_small", {"pretrained": True}), ("toy_small.in1k", {}), ("toy_small.in22k", {})])
def test_pretrained_weights_are_found_by_the_table(tmp_path, name, options):
    model, state = published()
    in_hub_cache(tmp_path, "someone/toy", "model.safetensors", state)
    in_hub_cache(tmp_path, "timm/vit_tiny_patch16_224.augreg_in21k", "model.safetensors", state)
    assert_unchanged(vitarium.create_model(name, **options), model.state_dict())


def test_the_second_source_is_used_where_the_first_is_out_of_reach(tmp_path):
    model, state = published()
    path = tmp_path / "torch/checkpoints/toy.pth"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    assert fetch_pretrained("toy_small") == path
    assert_unchanged(vitarium.create_model("toy_small", pretrained=True), model.state_dict())


def test_without_a_network_the_message_names_the_files_and_what_to_do():
    with pytest.raises(CheckpointError) as caught:
        vitarium.create_model("toy_small", pretrained=True)
    message = str(caught.value)
    assert "cannot fetch the weights of toy_small" in message
    assert "https://huggingface.co/someone/toy/resolve/main/model.safetensors" in message
    assert "https://example.org/toy.pth" in message
    assert "pass checkpoint=PATH" in message


def test_offline_mode_asks_nobody(monkeypatch):
    import huggingface_hub.constants

    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **options: asked.append(args))
    with pytest.raises(CheckpointError, match=r"checkpoint=PATH.*HF_HUB_OFFLINE is set"):
        fetch_pretrained("toy_small", "in1k")
    assert not asked


def test_unknown_tags_and_models_without_weights():
    with pytest.raises(UsageError, match=r"toy_small has no weights 'in22'; did you mean in22k"):
        vitarium.create_model("toy_small.in22")
    with pytest.raises(UsageError, match=r"no published weights of toy_wide are known; those of the family with weights: toy_small"):
        vitarium.create_model("toy_wide", pretrained=True)


def test_which_models_have_published_weights():
    having = ["toy_small", "toy_small.in22k", "timm/vit_small_patch16_224", "hf/owner/name"]
    lacking = ["toy_wide", "toy_small.in22", "timm/vit_pico", "timm/no_such_model"]
    assert [name for name in [*having, *lacking] if has_published(name)] == having


@pytest.mark.parametrize("source", ["hf:", "hf:someone", "hf:/x", "hf:some one/toy", "https://example.org/", "https://example.org/w#md5=1"])
def test_sources_of_no_known_form(source):
    with pytest.raises((UsageError, CheckpointError)) as caught:
        fetch(source)
    assert "hub" in str(caught.value) or "names no file" in str(caught.value) or "sha256=" in str(caught.value)


def test_a_source_that_timm_does_not_know():
    with pytest.raises(CheckpointError, match="has no weights 'swin_tinny'"):
        fetch("timm:swin_tinny")


# ---- addresses

RANGES: list[str | None] = []
"""What the server was asked for, the last request last."""


@pytest.fixture
def server(tmp_path):
    """A web server of this machine; gives its address and the folder that it serves."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            RANGES.append(self.headers.get("Range"))
            if "ranges" not in self.path or RANGES[-1] is None:
                return super().do_GET()
            content = (folder / self.path[1:]).read_bytes()
            start = int(RANGES[-1].removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:])

        def send_header(self, keyword, value):
            super().send_header(keyword, "99999999" if keyword == "Content-Length" and "short" in self.path else value)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as serving:
        thread = threading.Thread(target=lambda: serving.serve_forever(poll_interval=0.01), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_address[1]}", folder
        serving.shutdown()


def test_an_address_is_downloaded_once_into_torchs_cache(server, tmp_path):
    address, folder = server
    model, state = published()
    torch.save(state, folder / "toy 1.pth")
    digest = hashlib.sha256((folder / "toy 1.pth").read_bytes()).hexdigest()
    assert_unchanged(vitarium.create_model("toy_small", checkpoint=f"{address}/toy%201.pth#sha256={digest}"), model.state_dict())
    (folder / "toy 1.pth").unlink()
    assert fetch(f"{address}/toy%201.pth") == tmp_path / "torch/checkpoints/toy 1.pth"


def kept(tmp_path):
    """Files in torch's cache, but for locks."""
    return [path.name for path in (tmp_path / "torch/checkpoints").iterdir() if not path.name.startswith(".")]


def test_a_wrong_hash_is_refused_and_not_kept(server, tmp_path):
    address, folder = server
    (folder / "w.pth").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="expected sha256 00000000, got"):
        fetch(f"{address}/w.pth#sha256=00000000")
    assert not kept(tmp_path)


def test_a_download_that_always_breaks_off_is_given_up(server, tmp_path, monkeypatch):
    address, folder = server
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    (folder / "short.pth").write_bytes(b"x" * (11 * 2**20))  # more than the client's buffer, so that each try makes progress
    with pytest.raises(CheckpointError, match=r"cannot download short\.pth \(the server breaks off.*checkpoint=PATH"):
        fetch(f"{address}/short.pth")
    assert "short.pth" not in kept(tmp_path)


def test_an_interrupted_download_goes_on_where_it_was(server, tmp_path):
    """Of a server that knows ranges only the rest is asked for; of any other the whole file, and nothing is mixed."""
    address, folder = server
    content = bytes(range(256)) * 40
    digest = hashlib.sha256(content).hexdigest()
    for name, asked in (("ranges.pth", "bytes=1000-"), ("plain.pth", "bytes=1000-")):
        (folder / name).write_bytes(content)
        partial = tmp_path / f"torch/checkpoints/{name}.incomplete"
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content[:1000])
        path = fetch(f"{address}/{name}#sha256={digest}")
        assert path.read_bytes() == content
        assert RANGES[-1] == asked
    assert sorted(kept(tmp_path)) == ["plain.pth", "ranges.pth"]


def test_leftovers_of_another_file_are_thrown_away(server, tmp_path):
    address, folder = server
    (folder / "w.pth").write_bytes(b"right")
    partial = tmp_path / "torch/checkpoints/w.pth.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"longer than the file")
    assert fetch(f"{address}/w.pth").read_bytes() == b"right"


def test_an_address_that_is_not_there(server):
    address, _ = server
    with pytest.raises(CheckpointError, match=r"cannot download nothing\.pth \(.*404.*checkpoint=PATH"):
        fetch(f"{address}/nothing.pth")
