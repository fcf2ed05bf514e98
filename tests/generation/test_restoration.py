"""Common parts of restoration: tiles, metrics, samples, the learner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vitarium
from vitarium.data.image_set import ImageData
from vitarium.data.pairs import HighImages, PairedImages
from vitarium.errors import DataError, InputError, UsageError
from vitarium.generation.restoration import tiling
from vitarium.generation.restoration.learner import RestorationLearner
from vitarium.generation.restoration.metrics import LumaQuality, luma
from vitarium.generation.restoration.restorer import Restorer
from vitarium.generation.restoration.samples import PairTransform, enlarged, shrunk
from vitarium.generation.restoration.tiling import restore_image, strips
from vitarium.training import evaluate, find_learner, fit, load_recipe


class Nearest(Restorer):
    """Repeats pixels, and notes what it was given."""

    def __init__(self, scale: int = 2, multiple: int = 4):
        super().__init__(scale=scale, in_chans=3, multiple=multiple)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[tuple[int, int]] = []

    def restore(self, image: Tensor) -> Tensor:
        self.seen.append(tuple(image.shape[-2:]))
        return image.repeat_interleave(self.scale, -1).repeat_interleave(self.scale, -2)


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    coarse = np.random.RandomState(seed).randint(0, 255, (height // 5 + 1, width // 5 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


# ---- tiles


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 40), (1, 200), (33, 97), (16, 16), (100, 17)])
@pytest.mark.parametrize(("tile", "overlap"), [(32, 8), (32, 0), (40, 16), (64, 30), (0, 0)])
def test_tiles_of_a_local_model_equal_the_whole(height: int, width: int, tile: int, overlap: int):
    image = torch.rand(3, height, width)
    model = Nearest()
    with torch.no_grad():
        tiled = torch.cat(list(strips(model, image, tile=tile, overlap=overlap)), 1)
        torch.testing.assert_close(tiled, Nearest()(image[None])[0])
    if tile:
        assert max(max(size) for size in model.seen) <= tile + 4


def test_a_model_that_errs_at_borders_shows_no_seam():
    """Errors near a tile's border are blended out, not cut."""

    class Bordered(Nearest):
        def restore(self, image: Tensor) -> Tensor:
            ramp = 0.1 * torch.exp(-torch.arange(image.shape[-1]).float())
            return super().restore(image * 0 + 0.5 + ramp + ramp.flip(0))

    with torch.no_grad():
        row = torch.cat(list(strips(Bordered(), torch.rand(3, 16, 160), tile=64, overlap=24)), 1)[0, 8]
    inside = row[8:-8]
    assert (inside - 0.5).abs().max() < 0.01
    assert inside.diff().abs().max() < 0.002


@pytest.mark.parametrize(("tile", "overlap"), [(32, 20), (8, 8), (-1, 0), (32, -4), (2, 0)])
def test_tiles_that_cannot_be_used_are_refused(tile: int, overlap: int):
    with pytest.raises(UsageError, match="needs tiles of at least"):
        list(strips(Nearest(), torch.rand(3, 16, 16), tile=tile, overlap=overlap))


@pytest.mark.identity
def test_the_ensemble_turns_with_the_image():
    """A flip or rotation of the image gives the flipped or rotated result; a model that has this property itself is unchanged."""
    torch.manual_seed(0)
    model = vitarium.create_model("drct_pico", depths=[1], embed_dim=16, growth=8).double().eval()
    image = torch.rand(1, 3, 16, 24, dtype=torch.float64)
    with torch.inference_mode():
        whole, alone = tiling.restored_in_all_orientations(model, image), model(image)
        for turn in (lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.rot90(1, (-2, -1)), lambda x: x.transpose(-2, -1)):
            torch.testing.assert_close(tiling.restored_in_all_orientations(model, turn(image)), turn(whole), rtol=0, atol=1e-12)
            assert (model(turn(image)) - turn(alone)).abs().max() > 1e-6
    assert whole.shape == (1, 3, 32, 48)
    image = torch.rand(3, 33, 20)
    plain, eight = (torch.cat(list(strips(Nearest(), image, tile=16, overlap=4, ensemble=on)), 1) for on in (False, True))
    torch.testing.assert_close(eight, plain, rtol=0, atol=1e-6)


def test_the_ensemble_is_an_option_of_restore(tmp_path):
    torch.manual_seed(0)
    model = vitarium.create_model("drct_pico", depths=[1], embed_dim=16)
    picture().save(tmp_path / "a.png")
    for name, options in (("plain", {}), ("eight", dict(ensemble=True))):
        vitarium.restore(tmp_path / "a.png", model, tmp_path / name, **options)
    want = restore_image(model, picture(), ensemble=True)
    assert np.array_equal(Image.open(tmp_path / "eight/a.png"), want)
    assert not np.array_equal(Image.open(tmp_path / "plain/a.png"), want)


def test_pictures_keep_their_mode():
    model = Nearest()
    grey = restore_image(model, picture().convert("L"))
    assert (grey.mode, grey.size) == ("L", (80, 60))
    clear = picture().convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((40, 30)))
    restored = restore_image(model, clear)
    assert (restored.mode, restored.size) == ("RGBA", (80, 60))
    assert restored.getchannel("A").getextrema() != (255, 255)
    assert np.array_equal(np.asarray(restored)[::2, ::2, :3], np.asarray(clear)[..., :3])


def test_a_result_that_memory_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiling, "MAX_PIXELS", 1000)
    with pytest.raises(InputError, match="crop the image first"):
        restore_image(Nearest(), picture())


# ---- metrics


def test_luma_has_known_values():
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    expected = [16.0, 235.0, 81.481, 144.553, 40.966]
    assert luma(colours.T[:, None])[0, 0].tolist() == pytest.approx(expected)
    assert luma(torch.tensor([[[0, 255]]], dtype=torch.uint8)).flatten().tolist() == pytest.approx([16.0, 235.0])


def test_psnr_of_a_constant_error_is_known():
    a = torch.full((3, 24, 24), 100, dtype=torch.uint8)
    quality = LumaQuality(border=2)
    quality.update(a, a + 10)  # 10 * 219 / 255 on luma
    assert quality.compute()["psnr"] == pytest.approx(20 * np.log10(255 / (10 * 219 / 255)), abs=1e-4)


def test_the_border_does_not_count():
    a = torch.randint(0, 255, (3, 24, 24), dtype=torch.uint8)
    b = (a // 2 + 60).to(torch.uint8)
    c = b.clone()
    c[:, :3], c[:, :, -3:] = 0, 255
    values = []
    for other in (b, c):
        quality = LumaQuality(border=3)
        quality.update(a, other)
        values.append(quality.compute())
    assert values[0] == values[1]


def test_psnr_and_ssim_equal_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    high = torch.from_numpy(np.array(picture(50, 44))).permute(2, 0, 1)
    low = (high.float() + 12 * torch.randn(high.shape)).clamp(0, 255).to(torch.uint8)
    quality = LumaQuality(border=4)
    quality.update(low, high)
    x, y = (luma(image)[0, 4:-4, 4:-4].numpy() for image in (low, high))
    ssim = metrics.structural_similarity(x, y, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert quality.compute()["psnr"] == pytest.approx(metrics.peak_signal_noise_ratio(y, x, data_range=255), abs=1e-4)
    assert quality.compute()["ssim"] == pytest.approx(ssim, abs=1e-6)


def test_means_are_over_pictures_of_any_size():
    quality, alone = LumaQuality(2), []
    for side, step in ((20, 5), (40, 20), (8, 3)):  # the last is too small for a window of SSIM
        a = torch.full((3, side, side), 100, dtype=torch.uint8)
        quality.update(a, a + step)
        alone.append(20 * np.log10(255 / (step * 219 / 255)))
    assert quality.compute()["psnr"] == pytest.approx(np.mean(alone), abs=1e-4)
    with pytest.raises(ValueError, match="shape"):
        quality.update(a, a[:, 1:])


# ---- samples


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_training_crop_is_a_crop_of_the_whole_pair(scale: int):
    """Making the crop small gives what making the image small and cropping gives, also at the image's border."""
    whole = picture(24 * scale, 20 * scale)
    low, high = PairTransform(scale)(whole, None)
    torch.manual_seed(0)
    for _ in range(8):
        x, y = PairTransform(scale, crop=8)(whole, None)
        windows = low.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).float() / 255
        difference = (windows - x).abs().amax((2, 3, 4))
        top, left = divmod(int(difference.argmin()), difference.shape[1])
        assert difference.min() < 1e-6
        part = high[:, top * scale : (top + 8) * scale, left * scale : (left + 8) * scale]
        torch.testing.assert_close(y, part.float() / 255)


def test_crops_of_pairs_are_aligned_and_varied_alike():
    high = picture(64, 48)
    low = Image.fromarray(np.asarray(high)[::2, ::2])
    seen = set()
    for seed in range(20):
        import random

        random.seed(seed)
        x, y = PairTransform(2, crop=8, flip=0.5)(low, high)
        assert x.shape == (3, 8, 8)
        assert y.shape == (3, 16, 16)
        matches = [torch.equal(y[:, i::2, j::2], x) for i in (0, 1) for j in (0, 1)]
        assert any(matches)
        seen.add(matches.index(True))
    assert len(seen) == 4  # each flip moves the pixel that was kept


def test_small_and_odd_pictures_are_made_to_fit():
    x, y = PairTransform(2, crop=16)(picture(10, 7), None)
    assert x.shape == (3, 16, 16)
    assert y.shape == (3, 32, 32)
    low, high = PairTransform(2)(picture(11, 7), None)
    assert low.shape == (3, 3, 5)
    assert high.shape == (3, 6, 10)
    low, high = PairTransform(2)(picture(11, 7), 0)
    assert low.shape == (3, 7, 11)
    assert high.numel() == 0


def test_enlarged_and_shrunk_are_eight_bit():
    image = torch.from_numpy(np.array(picture(16, 12))).permute(2, 0, 1)
    assert shrunk(image, 2).dtype == enlarged(image, 2).dtype == torch.uint8
    assert enlarged(shrunk(image, 2), 2).shape == image.shape


# ---- the learner


@pytest.fixture
def files(tmp_path) -> list[str]:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        picture(40 + 2 * i, 30, seed=i).save(path)
    return [str(path) for path in paths]


def test_it_learns_draws_and_measures(files: list[str], tmp_path):
    data = ImageData("three", HighImages(files[:2]), HighImages(files[2:]), [])
    changes = [
        "budget.steps=2",
        "batch_size=2",
        "image_size=8",
        "model_arguments.depths=[1]",
        "model_arguments.embed_dim=16",
        "optimizer.lr=1e-6",
    ]
    recipe = load_recipe("drct_pico", changes)
    learner = find_learner("restoration").create("drct_pico", data, recipe)
    result = fit(learner, data, recipe, tmp_path / "run")
    assert {"psnr", "ssim", "bicubic_psnr", "bicubic_ssim"} < set(result.metrics)
    assert abs(result.metrics["psnr"] - result.metrics["bicubic_psnr"]) < 6  # it starts as an interpolation
    (drawn,) = (tmp_path / "run" / "pictures").glob("restored-*2.png")
    assert Image.open(drawn).width == 3 * 192
    model = learner.eval_model()
    vitarium.save(model, tmp_path / "model.safetensors")
    again = evaluate(vitarium.load(tmp_path / "model.safetensors"), data.val)
    assert again["psnr"] == pytest.approx(result.metrics["psnr"], abs=1e-3)


def test_answers_are_the_restored_pictures(files: list[str]):
    learner = RestorationLearner(Nearest())
    batch = learner.collate([learner.transform(None)(Image.open(files[0]), 0)])
    (answer,) = learner.task.answers(learner.model.eval(), batch)
    assert (answer["width"], answer["height"]) == (80, 60)
    assert learner.task.draw(Image.open(files[0]), answer).size == (80, 60)


def test_losses_are_what_they_are_called():
    batch = {"image": torch.zeros(1, 3, 4, 4), "target": torch.full((1, 3, 8, 8), 0.5)}
    values = {
        name: float(RestorationLearner(Nearest(), RestorationLearner.Settings(loss=name)).loss(batch)["loss"])
        for name in ("l1", "l2", "charbonnier")
    }
    assert values == pytest.approx({"l1": 0.5, "l2": 0.25, "charbonnier": (0.25 + 1e-6) ** 0.5})


def test_pairs_of_another_scale_are_refused_before_training(files: list[str]):
    pairs = PairedImages([(files[0], files[0])] * 2, scale=4)
    recipe = load_recipe("drct_pico")
    with pytest.raises(DataError, match=r"images 2 times.*4 times larger"):
        find_learner("restoration").create("drct_pico", ImageData("p", pairs, pairs, []), recipe)
    with pytest.raises(DataError, match="data of that scale"):
        evaluate(RestorationLearner(Nearest()), PairedImages([(files[0], files[0])], scale=1))


def test_what_has_no_meaning_for_pairs_is_refused():
    learner = RestorationLearner(Nearest())
    with pytest.raises(UsageError, match=r"augment\.erase"):
        learner.transform(load_recipe("drct_pico", ["augment.erase=0.5"]).augment)
    with pytest.raises(UsageError, match="does not restore images"):
        RestorationLearner(torch.nn.Linear(2, 2))


def test_both_recipes_are_valid():
    for name in ("drct", "drct_pico"):
        recipe = load_recipe(name)
        assert recipe.objective["name"] == "restoration"
        assert recipe.model.startswith("drct_")
