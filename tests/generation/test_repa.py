"""REPA: equality with the authors' code, the alignment of any denoiser to any frozen encoder, its learner."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vitarium
from tests.golden import RESULTS, compare, fill_state, make_input, read_golden, time_rates
from vitarium.data import open_data
from vitarium.errors import UsageError
from vitarium.generation import frechet
from vitarium.generation.diffusion import Alignment, Encoder, Flow, SiT, hidden_tokens
from vitarium.generation.diffusion.alignment import alignment_loss, token_grid
from vitarium.generation.diffusion.dit import SIZES
from vitarium.generation.diffusion.learner import DiffusionLearner
from vitarium.generation.repa import REPA, REPALearner, default_block
from vitarium.training import Recipe, evaluate, find_learner, fit, load_recipe
from vitarium.training.learners import learner_of

GOLDEN = "repa-sit_s2_enc4"
TINY = dict(embed_dim=32, depth=3, num_heads=2, patch_size=2, image_size=8, latent_chans=0, latent_stride=1, num_classes=3)


@pytest.fixture
def encoder():
    torch.manual_seed(1)
    return Encoder("a ViT", vitarium.create_model("timm/vit_pico", num_classes=0, image_size=16))


def awake(model):
    for name, parameter in model.named_parameters():
        if "modulation" in name or "final" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def batch(size=8, channels=3):
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(4, channels, size, size, generator=generator) * 2 - 1
    return {"image": image, "target": torch.tensor([0, 1, 2, 0]), "index": torch.arange(4)}


def test_equals_the_authors_network():
    doc = read_golden(GOLDEN)
    model = REPA(**SIZES["s"], patch_size=2, encoder_depth=4)
    official = next(f for f in vitarium.catalog.families("repa")).dialects["official"]
    model.double().load_state_dict(official(fill_state(doc["state"])), strict=True)
    model.time_embed.rates = time_rates().double()
    assert sum(p.numel() for p in model.parameters()) + model.pos_embed.numel() == doc["parameters"]
    x, t, y = (make_input(key, spec) for key, spec in doc["inputs"].items())
    with torch.no_grad():
        velocity, (z0,) = model.eval().forward_aligned(x, t, y)
        error = compare(GOLDEN, {"out": velocity, "z0": z0})
        assert error < 1e-9
        RESULTS.append((GOLDEN, error))
        velocity, (z0,) = model.float().forward_aligned(x.float(), t.float(), y)
        assert compare(GOLDEN, {"out": velocity, "z0": z0}) < 1e-3


@pytest.mark.parametrize(("name", "millions"), [("repa_b_2", 137.85), ("repa_l_2", 465.96), ("repa_xl_2", 683.24)])
def test_parameter_counts_of_the_card(name, millions):
    with torch.device("meta"):
        model = vitarium.create_model(name)
    assert (sum(p.numel() for p in model.parameters()) + model.pos_embed.numel()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_old_files_with_decoder_blocks_load():
    model = REPA(**TINY, encoder_depth=2, z_dims=(8,), projector_dim=16)
    official = next(f for f in vitarium.catalog.families("repa")).dialects["official"]
    renamed = official(
        {"blocks.0.mlp.fc1.weight": torch.zeros(1), "blocks.1.x": torch.zeros(1), "decoder_blocks.0.mlp.fc1.weight": torch.ones(1)}
    )
    assert "blocks.2.mlp.fc1.weight" in renamed
    assert "blocks.2.mlp.fc1.weight" in model.state_dict()


# ---- identities


@pytest.mark.identity
def test_the_alignment_is_minus_one_for_equal_tokens_and_plus_one_for_opposite():
    z = torch.randn(2, 5, 7).double()
    torch.testing.assert_close(alignment_loss(z, 3 * z), -torch.ones(2).double())
    torch.testing.assert_close(alignment_loss(z, -z), torch.ones(2).double())


@pytest.mark.identity
def test_coefficient_zero_gives_exactly_the_gradients_of_the_flow(encoder):
    torch.manual_seed(0)
    model = awake(REPA(**TINY, encoder_depth=2, z_dims=(encoder.dim,), projector_dim=16, class_drop_rate=0.0))
    gradients = []
    for learner in (REPALearner(model, REPALearner.Settings(coefficient=0.0), encoders=[encoder]), DiffusionLearner(model)):
        learner.process = Flow()
        model.zero_grad()
        torch.manual_seed(5)
        learner.loss(batch())["loss"].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "projectors" not in name})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.identity
def test_the_side_branch_changes_nothing_and_reaches_the_first_blocks_only(encoder):
    model = awake(REPA(**TINY, encoder_depth=2, z_dims=(encoder.dim,), projector_dim=16)).eval()
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 1])
    velocity, (said,) = model.forward_aligned(x, t, y)
    assert torch.equal(velocity, model(x, t, y))
    said.sum().backward()
    reached = {int(name.split(".")[1]) for name, p in model.named_parameters() if name.startswith("blocks.") and p.grad is not None}
    assert reached == {0, 1}


@pytest.mark.identity
def test_output_is_zero_at_first():
    assert not REPA(**TINY, encoder_depth=1)(torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 1])).any()


# ---- any denoiser, any encoder


class Convolutional(nn.Module):
    """A denoiser of another make: its block gives a map."""

    sample_chans, sample_size, num_classes = 3, 8, 3

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.last = nn.ConvTranspose2d(12, 3, 2, stride=2)

    def forward(self, x, t, labels=None):
        return self.last(F.silu(self.first(x)) + t.view(-1, 1, 1, 1))


@pytest.mark.parametrize("name", ["convnext_pico", "timm/vit_pico", "timm/resnet_pico"])
@pytest.mark.parametrize("kind", ["sit", "convolutional"])
def test_aligns_any_denoiser_to_any_encoder(name, kind):
    torch.manual_seed(0)
    model, block = (SiT(**TINY), "blocks.0") if kind == "sit" else (Convolutional(), "first")
    encoder = Encoder(name, vitarium.create_model(name, num_classes=0))
    alignment = Alignment(model, block, [encoder, encoder], hidden_dim=16)
    x, image = torch.randn(2, 3, 8, 8), torch.rand(2, 1, 8, 8)
    with hidden_tokens(model, [block]) as hidden:
        model(x, torch.rand(2))
    losses = alignment(hidden[block], image, x.shape[-2:])
    assert losses.shape == (2,)
    losses.sum().backward()
    assert next(model.parameters()).grad is not None
    assert all(p.grad is None for p in encoder.model.parameters())
    assert not model._forward_hooks


def test_an_encoder_is_given_the_size_that_makes_its_grid_fit(encoder):
    assert encoder.map(torch.rand(1, 3, 16, 16), (2, 2)).shape == (1, 48, 2, 2)  # at 8 pixels
    native = encoder.map(torch.rand(1, 3, 16, 16))
    assert native.shape == (1, 48, 4, 4)
    assert encoder.map(torch.rand(1, 3, 16, 16), (8, 8)).shape == (1, 48, 8, 8)  # interpolated
    image = torch.rand(2, 3, 16, 16)
    tokens = encoder.model.forward_features(encoder_input(encoder, image))[:, 1:]
    torch.testing.assert_close(encoder.tokens(image, (4, 4)), tokens, rtol=1e-5, atol=1e-5)


def encoder_input(encoder, image):
    pre = encoder.model.preprocessing
    return (image - torch.tensor(pre.mean).view(-1, 1, 1)) / torch.tensor(pre.std).view(-1, 1, 1)


def test_refuses_what_cannot_be_aligned(encoder):
    model = SiT(**TINY)
    with pytest.raises(UsageError, match=r"no block 'block.1'; did you mean"):
        Alignment(model, "block.1", [encoder])
    with pytest.raises(UsageError, match="do not form a grid"):
        token_grid(17, 8, 8)
    with pytest.raises(UsageError, match="returns no intermediate maps"):
        Encoder("a layer", nn.Linear(1, 1))
    with pytest.raises(UsageError, match=r"create it with z_dims=\[48\]"):
        REPALearner(REPA(**TINY, encoder_depth=1, z_dims=(8,)), encoders=[encoder])
    with pytest.raises(UsageError, match=r"name a block with objective\.block"):
        default_block(Convolutional())


# ---- the learner


def test_the_recipes_are_read():
    for name in ("repa", "repa_pico", "dit", "sit_flow", "sit_flow_pico"):
        recipe = load_recipe(name)
        assert recipe.settings_of(find_learner(recipe.objective["name"]))
    with pytest.raises(UsageError, match="coefficient"):
        load_recipe("repa_pico", ["objective.coeficient=1"])
    with pytest.raises(UsageError, match="path must be one of"):
        load_recipe("repa_pico", ["objective.process=flow:path=curved"])


def test_trains_draws_saves_and_is_evaluated(tmp_path, encoder):
    vitarium.save(vitarium.create_model("timm/vit_pico", num_classes=10, image_size=16), tmp_path / "encoder.safetensors")
    objective = dict(name="repa", encoders=[str(tmp_path / "encoder.safetensors")], projector_dim=16, steps=2, samples=8)
    recipe = Recipe(
        objective=objective,
        image_size=16,
        budget={"steps": 2},
        batch_size=8,
        optimizer={"lr": 1e-3},
        ema={"decay": 0.5},
        model_arguments=dict(embed_dim=16, depth=1, encoder_depth=1, num_heads=2, in_chans=1, projector_dim=16),
    )
    data = open_data("digits", val_fraction=0.01)
    learner = REPALearner.create("repa_pico", data, recipe)
    assert learner.model.projectors[0][-1].out_features == 48
    result = fit(learner, data, recipe, tmp_path / "run")
    assert {"loss", "frechet"} <= result.metrics.keys()
    assert list((tmp_path / "run" / "pictures").glob("samples-*.png"))
    vitarium.save(learner.eval_model(), tmp_path / "m.safetensors")
    again = vitarium.load(tmp_path / "m.safetensors")
    assert isinstance(learner_of(again), REPALearner)
    assert evaluate(again, data.val)["loss"] == pytest.approx(result.metrics["loss"], rel=1e-4)


# ---- the distance


@pytest.mark.identity
def test_the_distance_is_that_of_gaussians():
    """Against scipy's matrix root, the closed form where covariances commute, and 0 of a set to itself."""
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator).double()
    y = torch.randn(500, 6, generator=generator).double() @ torch.randn(6, 6, generator=generator).double() + 1
    (m1, s1), (m2, s2) = frechet.moments(x), frechet.moments(y)
    root = torch.from_numpy(sqrtm((s1 @ s2).numpy()).real)
    torch.testing.assert_close(
        frechet.frechet_distance(m1, s1, m2, s2), (m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * root.trace()
    )
    one = torch.eye(3).double()
    torch.testing.assert_close(frechet.frechet_distance(one[0], 4 * one, one[1], 9 * one), torch.tensor(2.0 + 3 * (3 - 2) ** 2).double())
    assert frechet.frechet_distance(m1, s1, m1, s1) < 1e-9
    few = frechet.moments(x[:4])  # rank-deficient
    assert frechet.frechet_distance(*few, *few) < 1e-6


def test_the_metric_adds_up_batches():
    metric = frechet.FrechetDistance(*frechet.extractor("pixels"))
    real, made = torch.rand(30, 3, 16, 16), torch.rand(40, 3, 16, 16) ** 2
    for part in real.split(7):
        metric.update(part, real=True)
    for part in made.split(9):
        metric.update(part, real=False)
    whole = frechet.frechet_distance(*frechet.moments(frechet.pixel_features(made)), *frechet.moments(frechet.pixel_features(real)))
    torch.testing.assert_close(metric.compute(), whole)
    alone = frechet.FrechetDistance(*frechet.extractor("pixels"))
    alone.update(real, real=True)
    assert alone.compute().isnan()


def test_any_backbone_can_be_the_extractor(tmp_path):
    vitarium.save(vitarium.create_model("timm/resnet_pico", num_classes=3), tmp_path / "judge.safetensors")
    features, dim = frechet.extractor(str(tmp_path / "judge.safetensors"))
    assert features(torch.rand(2, 3, 16, 16)).shape == (2, dim)


@pytest.mark.identity
def test_padding_does_not_change_the_alignment():
    torch.manual_seed(0)
    found, target = torch.randn(2, 3, 5, 8, dtype=torch.float64).unbind()
    found.requires_grad_()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False, True, True, False, True]])
    found_or_noise = torch.where(mask[..., None], found, torch.nan)
    padded = alignment_loss(found_or_noise, target, mask)
    packed = torch.stack([alignment_loss(f[m][None], t[m][None])[0] for f, t, m in zip(found, target, mask, strict=True)])
    torch.testing.assert_close(padded, packed, rtol=0, atol=1e-12)
    assert torch.equal(alignment_loss(found, target, torch.ones_like(mask)), alignment_loss(found, target))
    padded.sum().backward()
    assert (found.grad[~mask] == 0).all()
