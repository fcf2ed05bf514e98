"""Reading of weights files: tensors are found in containers; damaged, malicious and other files raise clear errors."""

import argparse
import io
import json
import pickle
import random
import struct
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from vitarium.catalog.states import read_state, read_weights
from vitarium.errors import CheckpointError

STATE = {"stem.weight": torch.arange(12.0).view(3, 4), "head.bias": torch.ones(2, dtype=torch.float16)}


def assert_reads(path: Path, wanted: dict[str, torch.Tensor] = STATE) -> None:
    state = read_state(path)
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor)
        assert state[name].dtype == tensor.dtype


def allowed() -> set:
    """torch's allow-list; it keeps no order."""
    return set(torch.serialization.get_safe_globals())


# ---- what is found


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin"])
def test_reads_both_formats_whatever_the_file_is_called(tmp_path, name):
    save_file(STATE, tmp_path / name)
    assert_reads(tmp_path / name)
    torch.save(STATE, tmp_path / name)
    assert_reads(tmp_path / name)


def test_reads_torch_files_of_the_older_layout(tmp_path):
    torch.save({"model": STATE}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert_reads(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "path", ["model", "state_dict", "model_ema", "state_dict_ema", "teacher", "student", "ema", "module", "model.state_dict", "ema.module"]
)
def test_opens_containers(tmp_path, path):
    content = STATE
    for key in reversed(path.split(".")):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "w.pth")
    assert_reads(tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").opened == path.split(".")


def test_prefers_the_averaged_weights(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "model_ema": {"a": torch.ones(1)}}, tmp_path / "w.pth")
    assert read_state(tmp_path / "w.pth")["a"] == 1


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "backbone.", "encoder.", "module._orig_mod.", "model.encoder."])
def test_strips_the_prefix_that_every_tensor_carries(tmp_path, prefix):
    save_file({prefix + name: tensor for name, tensor in STATE.items()}, tmp_path / "w.safetensors")
    assert_reads(tmp_path / "w.safetensors")
    assert prefix + "head.bias" in read_weights(tmp_path / "w.safetensors").forms[0], "the names as they are stay available"


def test_strips_the_prefix_that_nearly_every_tensor_carries(tmp_path):
    many = {f"encoder.blocks.{i}": torch.ones(1) for i in range(30)}
    torch.save({**many, "decoder.bias": torch.ones(1)}, tmp_path / "w.pth")
    assert set(read_state(tmp_path / "w.pth")) == {*(f"blocks.{i}" for i in range(30)), "decoder.bias"}


def test_leaves_a_prefix_that_only_a_part_carries(tmp_path):
    state = {"backbone.a": torch.ones(1), "head.b": torch.ones(1)}
    torch.save(state, tmp_path / "w.pth")
    assert_reads(tmp_path / "w.pth", state)


def test_reads_beside_the_options_of_the_authors_and_restores_torchs_allow_list(tmp_path):
    options = argparse.Namespace(lr=1e-3, best=np.float64(81.2), epoch=np.int64(3), dtype=np.dtype("float32"))
    torch.save({"model": STATE, "args": options, "top1": np.float32(81.2)}, tmp_path / "w.pth")
    before = allowed()
    assert_reads(tmp_path / "w.pth")
    assert allowed() == before


def test_what_a_user_has_allowed_stays_allowed(tmp_path):
    torch.save({"model": STATE, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "w.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert_reads(tmp_path / "w.pth")
        assert argparse.Namespace in allowed()


def test_threads_read_at_once_and_leave_torchs_allow_list_as_it_was(tmp_path):
    torch.save({"model": STATE, "args": argparse.Namespace(lr=1.0)}, tmp_path / "w.pth")
    before, failures = allowed(), []

    def read() -> None:
        try:
            for _ in range(20):
                assert_reads(tmp_path / "w.pth")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert allowed() == before


# ---- what is refused


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_state(path)
    return str(caught.value)


def test_missing_file_names_the_near_ones(tmp_path):
    torch.save(STATE, tmp_path / "swin_tiny.pth")
    assert "did you mean swin_tiny.pth?" in refusal(tmp_path / "swin_tinny.pth")
    assert "there is no folder" in refusal(tmp_path / "nowhere" / "swin_tiny.pth")
    assert "is a folder; name the file in it: swin_tiny.pth" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n <!DOCTYPE html><html><body>404", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", "git-lfs pointer to a file of 12,345 bytes"),
        (b"hello world\n" * 9, "no whole weights file"),
        (random.Random(0).randbytes(500), "no weights file that torch can read"),
    ],
)
def test_what_is_no_weights(tmp_path, content, words):
    (tmp_path / "w.pth").write_bytes(content)
    assert words in refusal(tmp_path / "w.pth")


def test_content_without_named_tensors(tmp_path):
    for content, words in [({"epoch": 1}, "a table of 'epoch'"), ([torch.ones(1)], "list"), (torch.ones(1), "Tensor"), ({}, "nothing")]:
        torch.save(content, tmp_path / "w.pth")
        assert "no named tensors" in refusal(tmp_path / "w.pth")
        assert words in refusal(tmp_path / "w.pth")


def test_a_container_that_holds_itself(tmp_path):
    content: dict = {}
    content["model"] = content
    torch.save(content, tmp_path / "w.pth")
    assert "no named tensors" in refusal(tmp_path / "w.pth")


def test_zip_and_torchscript_are_not_weights(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("photos/cat.jpg", "x")
    assert "zip archive without torch's weights (it holds photos/cat.jpg)" in refusal(tmp_path / "w.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "s.pt")
    assert "TorchScript program" in refusal(tmp_path / "s.pt")


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_truncation_is_told_with_sizes(tmp_path, ending):
    path = tmp_path / f"w.{ending}"
    (save_file if ending == "safetensors" else torch.save)(STATE, path)
    whole = path.read_bytes()
    for size in (1, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        message = refusal(path)
        assert str(path) in message
        if ending == "safetensors":
            assert f"got {size:,}" in message
            assert "expected" in message


# ---- hostile pickles


class Reduce:
    """Unpickles by calling a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _tar(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _zip(pickled: bytes, folder: str = "archive") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"{folder}/{name}", content)
    return buffer.getvalue()


def _payloads(canary: Path) -> dict[str, bytes]:
    call = Reduce(eval, f"open({str(canary)!r}, 'w')")
    text = f"open({str(canary)!r}, 'w')".encode()
    number = np.dtype("O")
    return {
        "reduce in a torch zip": _zip(pickle.dumps({"model": call}, 2)),
        "reduce beside good weights": _zip(pickle.dumps({"model": {"a": 1}, "extra": [call]}, 2)),
        "builtins through getattr": _zip(pickle.dumps(Reduce(getattr, canary, "touch"), 2)),
        "build with a state": _zip(b"\x80\x02cbuiltins\neval\n}b."),
        "inst": b"(S'" + text.replace(b"'", b'"') + b"'\nibuiltins\neval\n.",
        "obj": b"(cbuiltins\neval\nS'" + text.replace(b"'", b'"') + b"'\no.",
        "newobj": _zip(b"\x80\x02cbuiltins\neval\nU" + bytes([len(text)]) + text + b"\x85\x81."),
        "raw, protocol 0": pickle.dumps(call, 0),
        "raw, protocol 2": pickle.dumps(call, 2),
        "raw, protocol 4": pickle.dumps(call, 4),
        "numpy scalar that holds an object": _zip(pickle.dumps(Reduce(np.float64(0).__reduce__()[0], number, pickle.dumps(call, 2)), 2)),
        "legacy tar": _tar(pickle.dumps(call, 2)),
        "zip in a zip": _zip(pickle.dumps({"inner": _zip(pickle.dumps(call, 2)), "c": call}, 2)),
        "pickle called safetensors": pickle.dumps(call, 2),
    }


@pytest.mark.parametrize("kind", _payloads(Path("x")))
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path, kind, name):
    canary = tmp_path / "canary"
    (tmp_path / name).write_bytes(_payloads(canary)[kind])
    with pytest.raises(CheckpointError):
        read_state(tmp_path / name)
    assert not canary.exists()


def test_the_refusal_names_what_the_pickle_asks_for_and_how_to_convert(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    message = refusal(tmp_path / "module.pth")
    assert "torch.nn.modules.linear.Linear" in message
    assert "convert it once" in message
    (tmp_path / "raw.pkl").write_bytes(_payloads(tmp_path / "canary")["raw, protocol 4"])
    assert "builtins.eval" in refusal(tmp_path / "raw.pkl")


# ---- hostile safetensors


def _crafted(header: object, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _f32(start: int, end: int, *shape: int) -> dict:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


CRAFTED = {
    "header of 2^40 bytes": _crafted({}, length=2**40),
    "header of 2^63 bytes": _crafted({}, length=2**63),
    "overlap": _crafted({"a": _f32(0, 8, 2), "b": _f32(4, 12, 2)}),
    "hole": _crafted({"a": _f32(0, 4, 1), "b": _f32(8, 16, 2)}),
    "negative offset": _crafted({"a": _f32(-4, 4, 2)}),
    "shape that overflows": _crafted({"a": _f32(0, 16, 2**62, 2**62)}),
    "shape against bytes": _crafted({"a": _f32(0, 16, 3)}),
    "unknown dtype": _crafted({"a": {"dtype": "PICKLE", "shape": [4], "data_offsets": [0, 16]}}),
    "deep JSON": _crafted(b"[" * 50_000),
    "huge JSON": _crafted(b'{"a":"' + b"x" * 2_000_000 + b'"}'),
    "metadata that is no table": _crafted({"__metadata__": [1], "a": _f32(0, 16, 4)}),
    "not UTF-8": _crafted(b'{"\xff":1}'),
    "no JSON": _crafted(b"{" + b"\0" * 40),
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_hostile_safetensors_is_refused(tmp_path, kind):
    (tmp_path / "w.safetensors").write_bytes(CRAFTED[kind])
    assert "w.safetensors" in refusal(tmp_path / "w.safetensors")


def test_hostile_safetensors_take_no_memory(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind, content in CRAFTED.items():
        (tmp_path / f"{kind}.safetensors").write_bytes(content)
        refusal(tmp_path / f"{kind}.safetensors")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 2**10 * (2**10 if sys.platform == "darwin" else 1)  # kilobytes, on a Mac bytes


@pytest.mark.parametrize("seed", range(4))
def test_mutated_headers_are_read_or_refused_and_nothing_else_happens(tmp_path, seed):
    """Seeded fuzz of the header; a mutation may leave a valid file (a letter of a name), never another exception."""
    rng = random.Random(seed)
    whole = save({"a.weight": torch.ones(3, 2), "b": torch.ones(5, dtype=torch.int64)}, {"format": "pt"})
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    path = tmp_path / "w.safetensors"
    refused = 0
    for _ in range(2500):
        broken = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            kind, at = rng.randrange(4), rng.randrange(header)
            if kind == 0:
                broken[at] = rng.randrange(256)
            elif kind == 1:
                del broken[at : at + rng.randint(1, 8)]
            elif kind == 2:
                broken[at:at] = rng.randbytes(rng.randint(1, 8))
            else:
                broken[at : at + 1] = rng.choice([b"0", b"9", b"-", b"[", b"}", b'"', b"e99", b"\\u0000"])
        path.write_bytes(broken)
        try:
            read_state(path)
        except CheckpointError:
            refused += 1
    assert refused > 2000
