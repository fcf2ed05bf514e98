"""Video files, rendered motion, and preprocessing of clips."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitarium
from vitarium.catalog import Preprocessing
from vitarium.data import BrokenImage
from vitarium.data.clips import VideoFile, is_video_file, still_of
from vitarium.data.loader import Loader
from vitarium.data.scenes.actions import ACTIONS, FRAMES, draw_action, path_of
from vitarium.data.transforms import Augment, train_transform
from vitarium.errors import DataError, InputError, MissingExtra, UsageError
from vitarium.training import ClassificationLearner, evaluate, predict_logits
from vitarium.training.classification import Mixing


def grey_levels(count: int, size: int = 32) -> np.ndarray:
    """Frame i is all of grey 10 i: its colour encodes its number."""
    return np.repeat(np.arange(count, dtype=np.uint8)[:, None] * 10, 3 * size * size, 1).reshape(count, size, size, 3)


def write_video(path: Path, frames: np.ndarray, rate: int = 24, key_frames: int = 5) -> Path:
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *frames.shape[1:3], "yuv420p", key_frames
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(pictures: list[Image.Image]) -> list[int]:
    return [round(np.asarray(picture).mean() / 10) for picture in pictures]


@pytest.mark.parametrize("ending", ["mp4", "avi", "mkv"])
def test_frames_by_number(tmp_path: Path, ending: str):
    video = VideoFile(write_video(tmp_path / f"x.{ending}", grey_levels(20)))
    assert len(video) == 20
    for wanted in ([0, 1, 2], [7], [3, 9, 9, 17], [19, 19], list(range(20))):
        assert numbers(video.read_frames(wanted)) == wanted
    assert numbers([still_of(video)]) == [10]


def test_damaged_videos_are_broken_images(tmp_path: Path):
    whole = write_video(tmp_path / "whole.avi", np.random.default_rng(0).integers(0, 255, (30, 32, 32, 3), dtype=np.uint8))
    content = whole.read_bytes()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(content[: len(content) // 2])
    try:
        clip = VideoFile(cut)
        assert all(frame.size == (32, 32) for frame in clip.read_frames([0, len(clip) - 1]))
    except BrokenImage:
        pass
    for name, bytes_ in {"empty.mp4": b"", "text.mp4": b"hello " * 100, "head.mp4": content[:40]}.items():
        (tmp_path / name).write_bytes(bytes_)
        with pytest.raises(BrokenImage, match=name):
            VideoFile(tmp_path / name)
    with pytest.raises(BrokenImage):
        VideoFile(tmp_path / "absent.mp4")


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.mp4").touch()
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingExtra, match=r"vitarium\[video\]"):
        vitarium.open_data(tmp_path)


def test_endings():
    assert is_video_file("a/b.MP4")
    assert not is_video_file("a/._b.mp4")
    assert not is_video_file("a/b.jpg")


# ---- which frames a model sees


def test_frames_with_a_stride_come_from_the_middle_and_end_with_the_last():
    pre = Preprocessing(16, frames=4, stride=3)
    assert pre.frame_indices(20) == [5, 8, 11, 14]
    assert pre.frame_indices(20, start=10) == [10, 13, 16, 19]
    assert pre.frame_indices(5) == [0, 3, 4, 4]
    assert pre.last_start(20) == 10


def test_frames_without_a_stride_are_spread():
    assert Preprocessing(16, frames=4).frame_indices(16) == [2, 6, 10, 14]
    assert Preprocessing(16, frames=4).frame_indices(2) == [0, 0, 1, 1]
    with pytest.raises(InputError, match="no frames"):
        Preprocessing(16, frames=4).frame_indices(0)


def test_a_clip_is_its_pictures():
    pictures = [Image.fromarray(frame) for frame in grey_levels(8, 20)]
    still, moving = Preprocessing(16), Preprocessing(16, frames=4)
    clip = moving(pictures)
    assert clip.shape == (3, 4, 16, 16)
    assert torch.equal(clip[:, 2], still(pictures[5]))
    with pytest.raises(InputError, match="take a video model"):
        still(pictures)
    with pytest.raises(InputError, match="clips of 4 frames"):
        moving(pictures[0])
    assert Preprocessing(**moving.to_dict()) == moving
    with pytest.raises(UsageError, match="frames must be at least 1"):
        Preprocessing(frames=0)


def test_frames_are_varied_alike():
    pictures = [Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))] * 9
    transform = train_transform(Preprocessing(16, frames=3, stride=2), Augment(scale=(0.2, 1.0), flip=0.5, color_jitter=0.4, erase=0.5))
    random.seed(0)
    first, second = transform(pictures), transform(pictures)
    assert torch.equal(first[:, 0], first[:, 1])
    assert torch.equal(first[:, 0], first[:, 2])
    assert not torch.equal(first, second)


def test_training_clips_begin_anywhere():
    pictures = [Image.fromarray(frame) for frame in grey_levels(20, 16)]
    transform = train_transform(Preprocessing(16, mean=(0.0,) * 3, std=(1.0,) * 3, frames=2, stride=1), Augment(flip=0.5))
    random.seed(0)
    starts = {round(transform(pictures)[0, 0, 0, 0].item() * 25.5) for _ in range(200)}
    assert starts == set(range(19))


# ---- drawn motion


def test_motion_is_the_same_for_the_same_number():
    clip = draw_action(3, 0, 24)
    assert clip.shape == (FRAMES, 24, 24, 3)
    assert np.array_equal(clip, draw_action(3, 0, 24))
    assert not np.array_equal(clip, draw_action(3, 1, 24))
    assert not np.array_equal(clip[0], clip[5])


def test_paths_are_what_they_are_called():
    moves = {action: np.diff(path_of(action, np.random.default_rng(0)), axis=0) for action in ACTIONS}
    assert (moves["left"][:, 0] < 0).all()
    assert (moves["right"][:, 0] > 0).all()
    assert (moves["up"][:, 1] < 0).all()
    assert (moves["down"][:, 1] > 0).all()
    assert np.allclose(moves["circle"].sum(0), 0)
    along = moves["bounce"][:, np.abs(moves["bounce"]).max(0).argmax()]
    assert along[0] * along[-1] < 0


def test_one_frame_carries_no_information():
    """At any time the thing is anywhere with equal chance, whatever it does."""
    for action in ACTIONS:
        places = np.stack([path_of(action, np.random.default_rng((7, i))) % 1 for i in range(400)])
        for frame in (0, FRAMES // 2, FRAMES - 1):
            counts = np.histogram2d(places[:, frame, 0], places[:, frame, 1], bins=2, range=[[0, 1], [0, 1]])[0]
            assert counts.min() > 60  # 100 expected, deviation 9


# ---- from data to metrics


def test_actions_are_data():
    data = vitarium.open_data("scenes:task=action,length=36,image_size=16")
    assert data.classes == list(ACTIONS)
    clip, target = data.train[1]
    assert (len(clip), clip[0].size, data.classes[target]) == (FRAMES, (16, 16), "right")
    model = vitarium.create_model("uniformer_video_pico", num_classes=6)
    batch = next(iter(Loader(data.train, model.preprocessing, batch_size=4).epoch(0)))
    assert batch["image"].shape == (4, 3, 8, 16, 16)
    assert set(evaluate(model, data.val)) >= {"accuracy", "loss"}
    with pytest.raises(DataError, match="video model"):
        evaluate(vitarium.create_model("swin_pico", num_classes=6), data.val)


def test_clips_are_mixed_frame_by_frame_alike():
    learner = ClassificationLearner(
        vitarium.create_model("uniformer_video_pico", num_classes=3), ClassificationLearner.Settings(mixing=Mixing(cutmix=1.0))
    )
    image = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 8, 16, 16).contiguous()
    cut = set()
    for seed in range(6):
        np.random.seed(seed)
        mixed, shares = learner.mixed(image, torch.tensor([0, 1, 2, 0]))
        assert mixed.shape == image.shape
        assert torch.equal(mixed, mixed[:, :1, :1].expand_as(mixed))
        assert shares[0].tolist() == pytest.approx([1.0, 0, 0])  # 0 is mixed with the last, which is of its class
        cut.add((mixed[1, 0, 0] == 2).float().mean().item())
        assert shares[1, 2].item() == pytest.approx((mixed[1, 0, 0] == 2).float().mean().item())
    assert max(cut) > 0


def test_a_folder_of_videos_is_data(tmp_path: Path):
    for i in range(8):
        write_video(tmp_path / ("dark", "light")[i % 2] / f"{i}.mp4", grey_levels(6) + np.uint8(100 * (i % 2)))
    data = vitarium.open_data(tmp_path)
    assert (data.classes, len(data.train), len(data.val)) == (["dark", "light"], 6, 2)
    assert data.train.describe(0).endswith(".mp4")
    model = vitarium.create_model("uniformer_video_pico", num_classes=2)
    logits, targets, _ = predict_logits(model, data.val)
    assert logits.shape == (2, 2)
    assert targets.tolist() == [0, 1]
    (tmp_path / "dark" / "picture.png").write_bytes(b"x")  # images come first
    with pytest.raises(DataError, match="light/"):
        vitarium.open_data(tmp_path)


def test_broken_videos_are_left_out(tmp_path: Path):
    write_video(tmp_path / "a" / "1.mp4", grey_levels(6))
    write_video(tmp_path / "b" / "1.mp4", grey_levels(6))
    for name in ("a", "b"):
        (tmp_path / name / "2.mp4").write_bytes(b"not a video")
    data = vitarium.open_data(tmp_path, val_fraction=0.5)
    from vitarium.data import BadFiles

    bad = BadFiles(1.0)
    for part in (data.train, data.val):
        list(Loader(part, Preprocessing(16, frames=2), batch_size=2, bad_files=bad).epoch(0))
    assert sorted(Path(path).name for path, _ in bad.items()) == ["2.mp4", "2.mp4"]
