"""The hub out of reach: one attempt, the cache, and a message that says what to do."""

import socket

import pytest
import torch

import vitarium
from vitarium.catalog.hub import hub_or_cache
from vitarium.errors import CheckpointError

FEW = 2
"""One attempt of ours; once in a process the hub's client asks for a list of its own. With the client's retries there would be 6 a file."""


@pytest.fixture
def attempts(monkeypatch, tmp_path):
    """Names that the process tries to resolve, all in vain, with an empty cache and no pauses."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    asked: list[str] = []

    def resolve(host, *_args, **_options):
        asked.append(host)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


@pytest.mark.parametrize(
    ("name", "options", "repository"),
    [
        ("timm/vit_tiny_patch16_224", {"pretrained": True}, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        ("hf/somebody/vit", {"pretrained": True}, "somebody/vit"),
        ("hf/somebody/vit", {}, "somebody/vit"),
    ],
)
def test_a_hub_out_of_reach_is_asked_once(attempts, name, options, repository):
    from huggingface_hub import constants

    if name.startswith("hf/"):
        pytest.importorskip("transformers")
    with pytest.raises(CheckpointError) as caught:
        vitarium.create_model(name, **options)
    assert 1 <= len(attempts) <= FEW
    message = str(caught.value)
    for part in ("no such host", repository, f"hf download {repository}", str(constants.HF_HUB_CACHE), "checkpoint=PATH"):
        assert part in message
    assert not constants.HF_HUB_OFFLINE


def test_a_source_on_the_hub_is_asked_once(attempts):
    with pytest.raises(CheckpointError, match=r"cannot reach the hub for some/thing.*checkpoint=PATH"):
        vitarium.create_model("swin_pico", checkpoint="hf:some/thing")
    assert 1 <= len(attempts) <= FEW


def test_a_model_on_the_hub_out_of_reach_is_named_as_it_was_given(attempts):
    """There is no option checkpoint to give: the whole model is on the hub."""
    from vitarium.verbs.opening import open_model

    for ask in (open_model, lambda source: vitarium.load(source, fetch=True)):
        with pytest.raises(
            CheckpointError, match=r"cannot reach the hub for some/thing.*give the file in place of hf:some/thing$"
        ) as caught:
            ask("hf:some/thing")
        assert "checkpoint=" not in str(caught.value)


def test_the_offline_mode_ends_with_an_error(attempts):
    from huggingface_hub import constants

    with pytest.raises(ZeroDivisionError), hub_or_cache("some/thing") as reason:  # noqa: PT012
        assert reason
        assert constants.HF_HUB_OFFLINE
        raise ZeroDivisionError
    assert not constants.HF_HUB_OFFLINE


def test_an_autoencoder_out_of_reach(attempts):
    pytest.importorskip("diffusers")
    from vitarium.generation.diffusion.codecs import open_autoencoder

    with pytest.raises(CheckpointError, match=r"cannot open the autoencoder 'some/vae'.*hf download some/vae"):
        open_autoencoder("some/vae")
    assert 1 <= len(attempts) <= FEW


def test_folders_and_the_offline_mode_ask_nobody(attempts, monkeypatch):
    from huggingface_hub import constants

    with hub_or_cache("./folder") as reason:
        assert reason == ""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub_or_cache("some/thing") as reason:
        assert "HF_HUB_OFFLINE" in reason
    assert constants.HF_HUB_OFFLINE
    assert attempts == []


def test_a_name_that_no_repository_can_have_is_not_called_out_of_reach(attempts):
    with hub_or_cache("not a/na me") as reason:
        assert reason == ""
    assert attempts == []
