import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import RandomResizedCrop

from tests.data.pictures import picture
from vitarium.catalog.preprocessing import Preprocessing
from vitarium.data.loader import seed_generators
from vitarium.data.transforms import POLICIES, Augment, TrainTransform, random_box, train_transform
from vitarium.errors import UsageError
from vitarium.training.settings import check

PLAIN = Preprocessing(16, (0.5,) * 3, (0.25,) * 3, crop_pct=1.0)
EVERYTHING = Augment(scale=(0.3, 1.0), flip=0.5, policy="rand-m9-mstd0.5-inc1", erase=0.5, pad_crop=2)


def pixels(tensor, preprocessing=PLAIN):
    """Back to 0..255, (H, W, channels)."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return (255 * (tensor * std + mean)).permute(1, 2, 0)


def test_without_augmentation_training_sees_what_evaluation_sees():
    assert train_transform(PLAIN, Augment()) is PLAIN
    image = picture(size=(16, 16))
    assert torch.allclose(TrainTransform(PLAIN, Augment())(image), PLAIN(image), atol=1e-5)


@pytest.mark.parametrize("size", [(30, 20), (9, 40)])
def test_without_a_random_crop_the_middle_is_seen(size):
    preprocessing = Preprocessing(16, (0.5,) * 3, (0.25,) * 3, crop_pct=0.8)
    width, height = size
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    image = Image.fromarray(ramp.astype(np.uint8))
    seen = [pixels(t(image), preprocessing) for t in (TrainTransform(preprocessing, Augment()), preprocessing)]
    assert (seen[0] - seen[1]).abs().max() < 12, "the same part, to about a pixel"


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (2.0, 3.0)])
def test_the_random_crop_is_torchvisions_with_the_same_random_numbers(scale, ratio):
    sizes = [(32, 32), (1, 1), (57, 20), (3, 60), (60, 3)]  # the last two have no crop of these aspect ratios
    for seed, (width, height) in enumerate(10 * sizes):
        torch.manual_seed(seed)
        top, left, h, w = RandomResizedCrop.get_params(Image.new("L", (width, height)), list(scale), list(ratio))
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        assert random_box(width, height, scale, ratio) == (left, top, left + w, top + h)
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "1", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_and_channel_count(mode, channels):
    preprocessing = Preprocessing(12, (0.5,) * channels, (0.25,) * channels)
    image = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100) if mode == "I;16" else picture(size=(30, 20), mode=mode)
    tensor = TrainTransform(preprocessing, EVERYTHING)(image)
    assert tensor.shape == (channels, 12, 12)
    assert tensor.dtype == torch.float32
    assert tensor.isfinite().all()


def test_is_a_function_of_the_global_generators():
    transform, image = TrainTransform(PLAIN, EVERYTHING), picture(size=(40, 30))
    results = []
    for seed in (1, 1, 2):
        seed_generators(seed)
        results.append(transform(image))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_flips():
    transform, image = TrainTransform(PLAIN, Augment(flip=1.0)), picture(size=(16, 16))
    assert torch.allclose(transform(image), PLAIN(image).flip(-1), atol=1e-5)


def test_shifts_in_what_the_border_reflects():
    transform, image = TrainTransform(PLAIN, Augment(pad_crop=3)), picture(size=(16, 16))
    padded = np.pad(np.asarray(image), ((3, 3), (3, 3), (0, 0)), mode="reflect")
    windows = {padded[y : y + 16, x : x + 16].tobytes() for y in range(7) for x in range(7)}
    random.seed(0)
    seen = {pixels(transform(image)).round().byte().numpy().tobytes() for _ in range(60)}
    assert seen <= windows
    assert len(seen) > 20


def test_a_random_crop_is_resampled_once_and_stays_inside():
    image = Image.new("RGB", (40, 30), (10, 200, 90))
    tensor = TrainTransform(PLAIN, Augment(scale=(0.05, 0.5)))(image)
    assert torch.allclose(pixels(tensor), torch.tensor([10.0, 200.0, 90.0]), atol=0.01)


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m10-t3a", "augmix-m5-w3", "original", "originalr-mstd0.5", "v0", "v0r", "3a"]
)
def test_every_policy_runs_and_can_be_sent_to_workers(policy):
    transform = pickle.loads(pickle.dumps(TrainTransform(PLAIN, Augment(policy=policy))))
    image = picture(size=(20, 20))
    assert all(transform(image).shape == (3, 16, 16) for _ in range(40))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("rnd-m9", f"unknown augmentation policy 'rnd-m9'; did you mean rand.*kinds: {', '.join(POLICIES)}"),
        ("augmx-m3", "did you mean augmix"),
        ("rand-x9", "not in timm's form, such as 'rand-m9-mstd0.5-inc1'"),
        ("rand-weird", "'weird' is not in timm's form"),
    ],
)
def test_names_policies_near_an_unknown_one(policy, message):
    with pytest.raises(ValidationError, match=message):
        Augment(policy=policy)


def test_names_settings_near_an_unknown_one():
    with pytest.raises(UsageError, match="polcy is not a setting; did you mean policy"):
        check(Augment, {"polcy": "3a"}, "augment")


@pytest.mark.parametrize(
    "values", [{"flip": 2}, {"scale": (0.5, 0.1)}, {"scale": (0, 1)}, {"erase": float("nan")}, {"ratio": (-1, 1)}, {"pad_crop": -1}]
)
def test_refuses_values_out_of_range(values):
    with pytest.raises(ValidationError):
        Augment(**values)
