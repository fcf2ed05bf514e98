"""Properties of VAR: equality with the authors' code, the cache, masking between scales, editing, and its two learners."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vitarium
from tests.golden import RESULTS, assert_matches_golden, compare, fill_state, make_input, read_golden
from vitarium.data import ImageData
from vitarium.data.image_set import Subset
from vitarium.errors import InputError, UsageError
from vitarium.generation import Generator
from vitarium.generation.noise import ImageNoise
from vitarium.generation.var import VAR, VARTokenizer
from vitarium.generation.var.learner import perceptual_distance
from vitarium.generation.var.model import draw, official
from vitarium.generation.var.tokenizer import OFFICIAL as TOKENIZER_OFFICIAL
from vitarium.generation.var.tokenizer import phi_of_scales
from vitarium.generation.var.transformer import Steps
from vitarium.training import Recipe, find_learner, fit
from vitarium.training.learners import learner_of

SMALL = dict(scales=(1, 2, 3, 4), dim=32, code_dim=16, vocab_size=512, image_size=64)


ZNORM = dict(scales=(1, 2, 4, 6), dim=32, code_dim=8, vocab_size=256, phi_count=2, cosine_codes=True, image_size=96)
"""Sizes of the goldens with other options: two convolutions for four scales, codes by angle."""


def small(**options: object) -> VAR:
    """Return a model of the golden's sizes."""
    sizes = dict(
        depth=4, embed_dim=256, num_heads=4, tokenizer="var_tokenizer_256", tokenizer_arguments=SMALL, num_classes=10, image_size=64
    )
    return vitarium.create_model("var_d16", **(sizes | options))


def other() -> VAR:
    """Return a model of the golden's sizes with shared modulation, plain attention and codes by angle."""
    sizes = dict(depth=3, embed_dim=192, num_heads=3, tokenizer_arguments=ZNORM, image_size=96)
    return small(**sizes, shared_modulation=True, cosine_attention=False)


def pico(**options: object) -> VAR:
    """In float64, with gates and logits as large as after training."""
    torch.manual_seed(0)
    model = vitarium.create_model("var_pico", **options).double().eval()
    for name, parameter in model.transformer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.15 if "head" not in name else 0.5)
    return model


def random_codes(model: VAR) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(model.tokenizer.vocab_size, (2, n), generator=generator) for n in model.transformer.lengths]


def few(data: ImageData) -> ImageData:
    return ImageData(data.name, Subset(data.train, range(32)), Subset(data.val, range(16)), data.classes, data.image_size)


def in_scales(codes: Tensor, scales: tuple[int, ...] = (1, 2, 3, 4)) -> list[Tensor]:
    return list(codes.split([p * p for p in scales], 1))


def tokenizer_outputs(model: VARTokenizer, img: Tensor) -> dict[str, Tensor]:
    features = model.features(img)
    indices = model.quantizer(features).indices
    totals = model.totals(indices)
    ends = {"fhat": totals[-1], "fhat_first": totals[0], "rec": model.decode(indices)}
    return {"f": features, "indices": torch.cat(indices, 1).to(features.dtype), **ends}


@pytest.mark.parametrize(("golden", "sizes"), [("var-vqvae_small", SMALL), ("var-vqvae_znorm", ZNORM)])
def test_tokenizer_equals_the_authors(golden: str, sizes: dict):
    assert_matches_golden(golden, vitarium.create_model("var_tokenizer_256", **sizes), tokenizer_outputs)


@pytest.mark.parametrize(("golden", "build"), [("var-transformer_d4", small), ("var-transformer_shared_aln", other)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float32, 1e-4)])
def test_transformer_equals_the_authors(golden: str, build: Callable[[], VAR], dtype: torch.dtype, tolerance: float):
    """The goldens were made in float32, which the authors' quantizer forces: float64 can be no nearer than float32's rounding."""
    doc = read_golden(golden)
    model = build()
    model.load_state_dict(official(fill_state(doc["state"], doc["overrides"])), strict=True)
    assert sum(p.numel() for p in model.parameters()) == doc["parameters"]
    model.to(dtype).eval()
    tokens, label = (make_input(name, doc["inputs"][name]) for name in ("tokens", "label"))
    with torch.no_grad():
        views = model.tokenizer.inputs(in_scales(tokens, model.scales))
        image = model.generate(label, guidance=2.5, top_k=1, top_p=0)
        error = compare(golden, {"teacher_input": views, "logits": model.transformer(views, label), "greedy_image": image})
    assert error < tolerance
    if dtype is torch.float32:
        RESULTS.append((golden, error))


def test_convolutions_of_the_authors_other_options():
    """One convolution for all scales, one for each, and none: names and the function of phi."""
    codes = torch.randn(1, 1, 8)
    for count, theirs in ((1, "quantize.quant_resi.qresi."), (0, "quantize.quant_resi.3.")):
        model = vitarium.create_model("var_tokenizer_pico", phi_count=count, phi_ratio=0.25).eval()
        assert len(model.quantizer.phis) == (count or 4)
        assert TOKENIZER_OFFICIAL({f"{theirs}weight": codes}).keys() == {f"quantizer.phis.{3 if count == 0 else 0}.weight"}
        h = torch.nn.functional.interpolate(codes.view(1, 8, 1, 1), (4, 4), mode="bicubic")
        torch.testing.assert_close(model.quantizer.detail(codes, 0), 0.75 * h + 0.25 * model.quantizer.phis[0](h))
    assert phi_of_scales(4, 4) == [0, 1, 2, 3]
    plain = vitarium.create_model("var_tokenizer_pico", phi_ratio=0, conv_size=1)
    assert not list(plain.quantizer.phis.parameters())
    torch.testing.assert_close(plain.quantizer.detail(codes, 0), codes.view(1, 8, 1, 1).expand(-1, -1, 4, 4))
    assert plain.to_codes.weight.shape[2:] == (1, 1)
    for wrong in (dict(phi_ratio=2), dict(phi_count=-1), dict(conv_size=2)):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            vitarium.create_model("var_tokenizer_pico", **wrong)


@pytest.mark.identity
def test_codes_by_angle_do_not_depend_on_the_length_of_features():
    torch.manual_seed(0)
    quantizer = vitarium.create_model("var_tokenizer_pico", cosine_codes=True).double().quantizer
    places = torch.randn(2, 9, 8, dtype=torch.float64)
    by_angle = torch.nn.functional.cosine_similarity(places[:, :, None], quantizer.codebook.weight, dim=-1).argmax(-1)
    assert torch.equal(quantizer.nearest(places), by_angle)
    assert torch.equal(quantizer.nearest(100 * places), by_angle)


# ---- sizes and names


@pytest.mark.parametrize(("variant", "millions"), [("d16", 310.3), ("d20", 600.9), ("d24", 1033), ("d30", 2010), ("d36", 2353)])
def test_parameter_counts(variant: str, millions: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"var_{variant}")
    assert sum(p.numel() for p in model.transformer.parameters()) == pytest.approx(1e6 * millions, rel=1e-3)
    assert sum(p.numel() for p in model.tokenizer.parameters()) == pytest.approx(108.9e6, rel=1e-3)


def test_scales_share_convolutions_as_the_authors_do():
    assert phi_of_scales(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]  # 2/9 and 7/9 lie half way: rounding decides
    assert phi_of_scales(4, 4) == [0, 1, 2, 3]
    assert phi_of_scales(1, 1) == [0]


def test_loads_the_authors_two_files_as_one(tmp_path: Path):
    doc = read_golden("var-transformer_d4")
    state = fill_state(doc["state"], doc["overrides"])
    for part, file in (("var", "var_d4.pth"), ("vae", "vae.pth")):
        torch.save({n.removeprefix(f"{part}."): t for n, t in state.items() if n.startswith(f"{part}.")}, tmp_path / file)
    model = small(checkpoint=f"{tmp_path / 'var_d4.pth'} + {tmp_path / 'vae.pth'}")
    expected = official(state)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    alone = vitarium.create_model("var_tokenizer_256", **SMALL, checkpoint=tmp_path / "vae.pth")
    assert torch.equal(alone.decoder.conv_in.weight, model.tokenizer.decoder.conv_in.weight)


def test_saved_file_holds_the_tokenizer(tmp_path: Path):
    model = pico(tokenizer_arguments=dict(vocab_size=20))
    vitarium.save(model, tmp_path / "var.safetensors")
    again = vitarium.load(tmp_path / "var.safetensors")
    labels = torch.tensor([0, 3])
    assert isinstance(again, Generator)
    assert again.preprocessing == model.preprocessing
    assert torch.equal(again.generate(labels, seed=5), model.generate(labels, seed=5))


# ---- exact identities


@pytest.mark.identity
@pytest.mark.parametrize("options", [{}, dict(shared_modulation=True), dict(cosine_attention=False)], ids=str)
def test_the_cache_gives_the_logits_of_the_masked_forward(options: dict):
    model = pico(**options)
    labels, codes = torch.tensor([1, 10]), random_codes(model)
    views = model.tokenizer.inputs(codes)
    with torch.no_grad():
        expected = model.transformer(views, labels)
        for cached in (True, False):
            steps = Steps(model.transformer, labels, cached)
            found = [steps.next(view) for view in (None, *views.split(list(model.transformer.lengths[1:]), 1))]
            torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.identity
def test_the_cache_draws_the_same_pictures():
    model, labels = pico(), torch.tensor([0, 4, 9])
    assert torch.equal(model.generate(labels, seed=3), model.generate(labels, seed=3, cache=False))


@pytest.mark.identity
def test_a_scale_sees_itself_and_those_before():
    model, labels = pico(), torch.tensor([1, 2])
    views = model.tokenizer.inputs(random_codes(model))
    with torch.no_grad():
        before = model.transformer(views, labels).split(list(model.transformer.lengths), 1)
        begin = 0
        for k, length in enumerate(model.transformer.lengths[1:], start=1):
            changed = views.clone()
            changed[:, begin] += 1  # one token of scale k
            after = model.transformer(changed, labels).split(list(model.transformer.lengths), 1)
            for i in range(len(after)):
                same = (after[i] - before[i]).abs().amax(-1) < 1e-13
                assert same.all() if i < k else not same.any()
            begin += length


@pytest.mark.identity
def test_codes_alone_give_what_the_encoder_saw():
    model = pico().tokenizer
    image = 2 * torch.rand(2, 3, 16, 16, dtype=torch.float64) - 1
    features = model.features(image)
    coded = model.quantizer(features)
    totals = model.totals(coded.indices)
    torch.testing.assert_close(totals[-1], coded.features, rtol=0, atol=1e-12)
    torch.testing.assert_close(coded.places[-1], model.quantizer.view(features - totals[-2], 3), rtol=0, atol=1e-12)
    torch.testing.assert_close(model(image), model.decode(model.encode(image)), rtol=0, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(model.encode(image), coded.indices, strict=True))


@pytest.mark.identity
def test_guidance_of_one_is_none():
    model, labels = pico(), torch.tensor([2, 5])
    assert torch.equal(model.generate(labels, guidance=1), model.generate(labels, guidance=1 + 1e-12))
    assert not torch.equal(model.generate(labels, guidance=1), model.generate(labels, guidance=8))


@pytest.mark.identity
def test_editing_nothing_is_reconstruction():
    model, labels = pico(), torch.tensor([2, 5])
    image, mask = torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.zeros(1, 1, 16, 16)
    made = model.edit(image, mask, labels, paste=False)
    torch.testing.assert_close(made, (model.tokenizer(2 * image - 1).float() + 1) / 2)
    assert torch.equal(model.edit(image, mask, labels), image.float())


# ---- sampling and editing


def test_sampling_is_a_function_of_seed_and_options():
    model, labels = pico().float(), torch.tensor([0, 1, 10])
    torch.manual_seed(1)
    first = model.generate(labels, seed=1)
    state = torch.get_rng_state()
    assert torch.equal(model.generate(labels, seed=1), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model.generate(labels, seed=2), first)
    assert torch.equal(model.generate(labels, seed=1, top_k=1), model.generate(labels, seed=2, top_k=1))
    assert first.shape == (3, 3, 16, 16)
    assert 0 <= first.min() <= first.max() <= 1
    assert not first.is_inference()
    assert torch.isfinite(model.generate(labels, smooth=True)).all()


def test_draw_keeps_the_likeliest():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 4000, 4)
    uniform = ImageNoise(0, torch.tensor([0])).uniform(4000)
    for options, kept in ((dict(top_k=2), {0, 1}), (dict(top_p=0.79), {0, 1}), (dict(top_p=0.81), {0, 1, 2}), (dict(), {0, 1, 2, 3})):
        assert set(draw(logits, uniform, **options).unique().tolist()) == kept
    share = (draw(logits, uniform, top_k=2) == 0).double().mean()
    assert float(share) == pytest.approx(5 / 8, abs=0.03)


def test_editing_changes_the_masked_region_alone():
    model, labels = pico().float(), torch.tensor([2, 5])
    image, mask = torch.rand(1, 3, 16, 16), torch.zeros(2, 1, 16, 16)
    mask[0, :, :, 8:] = 1
    made = model.edit(image, mask, labels, seed=1, top_k=0)
    assert torch.equal(made[0, :, :, :8], image[0, :, :, :8])
    assert not torch.equal(made[0, :, :, 8:], image[0, :, :, 8:])
    assert torch.equal(made[1], image[0])
    assert torch.equal(model.edit(image, mask, labels, seed=1, top_k=0), made)


def test_reconstructions_grow_with_the_scales():
    model = pico()
    image = 2 * torch.rand(2, 3, 16, 16, dtype=torch.float64) - 1
    stages = model.reconstructions(image)
    assert stages.shape == (4, 2, 3, 16, 16)
    torch.testing.assert_close(stages[-1], ((model.tokenizer(image) + 1) / 2).float())


# ---- what users do wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps=7), "one step per scale, here 4"),
        (dict(top_p=1.5), "top_p must be a number from 0 to 1"),
        (dict(top_k=-1), "top_k must be a whole number"),
        (dict(guidance=-1), "guidance must be a number"),
        (dict(top_p="much"), "top_p must be a number"),
        (dict(cache=3), "cache must be true or false"),
        (dict(topk=3), "no option 'topk'; did you mean top_k"),
        (dict(seed=-1), "seed must be"),
        (dict(labels=torch.tensor([11])), "classes 0 to 9, got 11"),
        (dict(labels=torch.tensor([0.5])), "class numbers"),
    ],
)
def test_refuses_options(options: dict, message: str):
    with pytest.raises(UsageError, match=message):
        pico().generate(**{"labels": torch.tensor([1]), **options})


def test_refuses_pictures_and_sizes():
    model = pico().float()
    with pytest.raises(InputError, match=r"takes a floating-point image \(B, 3, 16, 16\)"):
        model.tokenizer(torch.zeros(1, 3, 20, 20))
    with pytest.raises(InputError, match=r"codes must be"):
        model.tokenizer.decode([torch.zeros(1, 2, dtype=torch.int64)])
    with pytest.raises(InputError, match="mask must be"):
        model.edit(torch.rand(1, 3, 16, 16), torch.ones(1, 1, 8, 8), torch.tensor([1]))
    with pytest.raises(InputError, match=r"in \[0, 1\]"):
        model.edit(2 * torch.ones(1, 3, 16, 16), torch.ones(1, 1, 16, 16), torch.tensor([1]))
    with pytest.raises(UsageError, match="no option 'topk'"):
        model.edit(torch.rand(1, 3, 16, 16), torch.ones(1, 1, 16, 16), torch.tensor([1]), topk=3)
    with pytest.raises(UsageError, match="image_size=12, got image_size=16"):
        vitarium.create_model("var_tokenizer_pico", scales=(1, 3))
    with pytest.raises(UsageError, match="scales must be ascending whole numbers"):
        vitarium.create_model("var_tokenizer_pico", scales=(2, 1))
    with pytest.raises(UsageError, match="embed_dim must be a multiple of"):
        vitarium.create_model("var_pico", num_heads=3)


# ---- tracing and training


def test_both_parts_trace():
    model = pico().float()
    image, views = torch.rand(2, 3, 16, 16), torch.rand(2, 29, 8)
    for part, inputs in ((model.tokenizer, (image,)), (model.transformer, (views, torch.tensor([1, 2])))):
        traced = torch.compile(part, fullgraph=True, backend="eager")
        torch.testing.assert_close(traced(*inputs), part(*inputs))


def recipe(kind: str, **objective: object) -> Recipe:
    sizes = dict(
        budget={"steps": 2},
        batch_size=8,
        optimizer={"lr": 1e-3},
        objective={"name": kind, **objective},
        eval_every="2 steps",
        image_size=16,
    )
    return Recipe(**sizes)  # type: ignore[arg-type]


def test_tokenizer_then_transformer(tmp_path: Path):
    pictures = vitarium.open_data("digits", task="image")
    first = find_learner("var_tokenizer").create("var_tokenizer_pico", pictures, recipe("var_tokenizer", revive=1))
    result = fit(first, few(pictures), recipe("var_tokenizer", revive=1), tmp_path / "tokenizer")
    assert {"psnr", "usage"} <= set(result.metrics)
    assert list((tmp_path / "tokenizer/pictures").glob("reconstructions-*.png"))
    file = tmp_path / "tokenizer.safetensors"
    vitarium.save(first.eval_model(), file)
    digits = vitarium.open_data("digits")
    settings = recipe("var", tokenizer=str(file), samples=16)
    second = find_learner("var").create("var_pico", digits, settings)
    assert isinstance(second.model, VAR)
    frozen = {name: tensor.clone() for name, tensor in second.model.tokenizer.state_dict().items()}
    assert torch.equal(frozen["from_codes.weight"], first.model.from_codes.weight)
    result = fit(second, few(digits), settings, tmp_path / "var")
    assert {"loss", "frechet"} <= set(result.metrics)
    assert all(torch.equal(frozen[name], tensor) for name, tensor in second.model.tokenizer.state_dict().items())
    vitarium.save(second.eval_model(), tmp_path / "var.safetensors")
    model = vitarium.load(tmp_path / "var.safetensors")
    assert model.labels == digits.classes
    assert len(learner_of(model).settings.model_dump()) == 4


def test_gradients_reach_every_part():
    batch = {"image": 2 * torch.rand(4, 3, 16, 16) - 1, "target": torch.arange(4)}
    for name in ("var_tokenizer", "var"):
        learner = find_learner(name)(vitarium.create_model(f"{name}_pico"))
        learner.loss(batch)["loss"].backward()
        without = [n for n, p in learner.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())]
        assert without == []


def test_perceptual_distance_is_of_the_judges_features():
    judge = vitarium.create_model("convnext_pico").eval()
    image = 2 * torch.rand(2, 3, 16, 16) - 1
    assert perceptual_distance(judge, image, image) == 0
    assert perceptual_distance(judge, -image, image) > 0


def test_idle_codes_move_to_where_they_are_wanted():
    learner = find_learner("var_tokenizer")(vitarium.create_model("var_tokenizer_pico"), None)
    learner.settings = learner.Settings(revive=1)
    codes = learner.model.quantizer.codebook.weight
    with torch.no_grad():
        codes[1:] = 1e3  # nobody wants these
    batch = {"image": 2 * torch.rand(4, 3, 16, 16) - 1}
    for step in range(2):
        learner.loss(batch)
        learner.after_step(step, 100)
    assert codes.detach().max() < 100
    assert int((learner.idle == 0).sum()) == len(codes)


def test_training_needs_a_tokenizer(tmp_path: Path):
    digits = vitarium.open_data("digits")
    with pytest.raises(UsageError, match="vitarium train var_tokenizer_pico"):
        find_learner("var").create("var_pico", digits, recipe("var"))
    vitarium.save(vitarium.create_model("swin_pico"), tmp_path / "swin.safetensors")
    with pytest.raises(UsageError, match="is not a tokenizer of images"):
        find_learner("var").create("var_pico", digits, recipe("var", tokenizer=str(tmp_path / "swin.safetensors")))
    with pytest.raises(UsageError, match="images of 16 pixels"):
        find_learner("var_tokenizer").create("var_tokenizer_pico", digits, recipe("var_tokenizer").model_copy(update=dict(image_size=20)))
