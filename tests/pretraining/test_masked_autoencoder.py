"""Properties of every masked autoencoder, and of its learner."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import vitarium
from vitarium.errors import InputError
from vitarium.pretraining.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderLearner, masked_mean, patch_errors


def small(**arguments) -> MaskedAutoencoder:
    torch.manual_seed(0)
    shape = dict(
        embed_dim=32, depth=2, num_heads=4, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=4, patch_size=4, image_size=16
    )
    return MaskedAutoencoder(**{**shape, **arguments}).double().eval()


def images(count: int = 2, height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(count, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def batch(count: int = 3) -> dict[str, Tensor]:
    return {"image": images(count), "target": torch.zeros(count), "index": torch.arange(count)}


@pytest.mark.identity
@pytest.mark.parametrize("ratio", [0.3, 0.75, 0.9])
def test_each_sample_hides_as_many(ratio: float):
    made = small()(images(5), mask_ratio=ratio)
    assert made.hidden.sum(1).tolist() == [16 - int(16 * (1 - ratio))] * 5
    assert made.latent.shape[1] == 1 + int(16 * (1 - ratio))


@pytest.mark.identity
def test_what_is_seen_gets_no_gradient():
    made = small()(images())
    prediction = made.prediction.detach().requires_grad_()
    masked_mean(patch_errors(prediction, torch.zeros_like(prediction)), made.hidden).backward()
    touched = prediction.grad.abs().sum(2) > 0
    assert torch.equal(touched, made.hidden.bool())


@pytest.mark.identity
def test_with_nothing_hidden_the_encoder_is_a_plain_transformer():
    model, image = small(), images()
    noise = torch.rand(2, 16)
    latent = model(image, noise, mask_ratio=0.0).latent
    plain = model.forward_features(image)
    order = noise.argsort(1)[..., None].expand(-1, -1, 32)
    torch.testing.assert_close(latent[:, :1], plain[:, :1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(latent[:, 1:], plain[:, 1:].gather(1, order), rtol=1e-12, atol=1e-12)


@pytest.mark.identity
def test_hidden_pixels_change_nothing():
    model, image = small(), images()
    noise = torch.rand(2, 16)
    made = model(image, noise)
    hidden = made.hidden.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    again = model(image + 100 * hidden, noise)
    assert torch.equal(again.prediction, made.prediction)


def test_other_sizes_have_tables_of_their_own():
    model = small()
    wide = model(images(2, 8, 24)).prediction
    built = small(image_size=32)
    built.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("pos_embed")}, strict=False)
    noise = torch.rand(2, 64)
    assert wide.shape == (2, 12, 48)
    torch.testing.assert_close(model(images(2, 32, 32), noise).prediction, built(images(2, 32, 32), noise).prediction)


def test_refuses_at_the_door():
    model = small()
    with pytest.raises(InputError, match="sides are multiples of 4, got 15x18; try 16x16"):
        model(images(1, 15, 18))
    with pytest.raises(InputError, match="leave at least one of 16 patches"):
        model(images(1), mask_ratio=0.99)
    with pytest.raises(InputError, match=r"noise must hold one number per patch, \(2, 16\), got \(2, 4\)"):
        model(images(), torch.rand(2, 4))
    with pytest.raises(InputError, match="channels"):
        model(images()[:, :1])


def test_compiles_without_a_break():
    torch._dynamo.reset()
    model = small()
    noise = torch.rand(2, 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images(), noise).prediction, model(images(), noise).prediction)


def test_every_trained_parameter_gets_a_gradient():
    model = small().train()
    MaskedAutoencoderLearner(model).loss(batch())["loss"].backward()
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {"encoder.pos_embed", "decoder.pos_embed"}
    assert not [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def test_saves_and_loads(tmp_path: Path):
    model = vitarium.create_model("thorax_mae_pretrain_pico").eval()
    vitarium.save(model, tmp_path / "m.safetensors")
    loaded = vitarium.load(tmp_path / "m.safetensors")
    noise = torch.rand(2, 16)
    assert torch.equal(loaded(images().float(), noise).prediction, model(images().float(), noise).prediction)
    assert not loaded.encoder.pos_embed.requires_grad


@pytest.mark.parametrize("norm_targets", [True, False])
def test_loss_is_the_mean_error_of_hidden_patches(norm_targets: bool):
    learner = MaskedAutoencoderLearner(small(), MaskedAutoencoderLearner.Settings(norm_targets=norm_targets))
    torch.manual_seed(5)
    loss = learner.loss(batch())["loss"]
    torch.manual_seed(5)
    made = learner.model(batch()["image"])
    errors = []
    for b, image in enumerate(batch()["image"]):
        for n in made.hidden[b].nonzero().flatten().tolist():
            row, column = divmod(n, 4)
            pixels = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].permute(1, 2, 0).flatten()
            if norm_targets:
                pixels = (pixels - pixels.mean()) / ((pixels - pixels.mean()).square().sum() / 47 + 1e-6).sqrt()
            errors.append((made.prediction[b, n] - pixels).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_held_out_masks_depend_on_the_number_alone():
    learner = MaskedAutoencoderLearner(small())
    whole, part = batch(3), {name: value[2:] for name, value in batch(3).items()}
    assert torch.equal(learner.task.masked(learner.model, whole).hidden[2:], learner.task.masked(learner.model, part).hidden)


def test_mean_colour_explains_nothing():
    learner = MaskedAutoencoderLearner(small(), MaskedAutoencoderLearner.Settings(norm_targets=False))
    flat = {**batch(), "image": torch.full((3, 3, 16, 16), 0.7, dtype=torch.float64) * torch.tensor([1, 2, 3.0]).view(3, 1, 1)}
    metrics = learner.metrics()
    learner.evaluate_batch(learner.model, flat, metrics)
    assert metrics["plain"].compute() < 1e-12
    learner.evaluate_batch(learner.model, batch(), metrics)
    assert learner.summary(metrics)["loss"] > 0


def test_a_picture_shows_the_original_what_was_seen_and_what_was_made_of_it():
    learner = MaskedAutoencoderLearner(small())
    triplets = learner.task.triplets(learner.model, batch())
    assert triplets.shape == (3, 16, 48, 3)
    hidden = learner.task.masked(learner.model, batch()).hidden.view(3, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2).bool()
    original, seen, restored = triplets.split(16, 2)
    assert torch.equal(seen[~hidden], original[~hidden])
    assert torch.equal(restored[~hidden], original[~hidden])
    assert (seen[hidden] == 128).all()
    picture = learner.pictures(learner.model, batch())["reconstruction"]
    assert picture.size[1] >= 240
    answer = learner.task.answers(learner.model, batch())[0]
    assert answer["reconstruction_error"] > 0
    assert learner.task.draw(picture, answer).width == 3 * learner.task.draw(picture, answer).height
