"""Video files as clips. Only the requested frames are decoded, so memory does not grow with the length of the video."""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vitarium.data.bad_files import BrokenImage
from vitarium.data.images import MAX_PIXELS, open_image
from vitarium.errors import require
from vitarium.files import open_regular

if TYPE_CHECKING:
    from PIL import Image

    from vitarium.data.image_set import ImageSet

EXTENSIONS = frozenset(["mp4", "m4v", "mov", "avi", "mkv", "webm", "mpg", "mpeg", "wmv", "flv", "3gp", "ogv", "ts"])
"""File extensions of videos, in lower case."""


def is_video_file(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a video by its name; hidden files are not."""
    name = os.path.basename(os.fspath(path))
    return not name.startswith(".") and name.rpartition(".")[2].lower() in EXTENSIONS


def open_file(path: str | os.PathLike[str]) -> Image.Image | VideoFile:
    """Open an image or a video, by the file's extension.

    Raises:
        BrokenImage: it cannot be read.
        MissingExtra: it is a video, and PyAV is not installed.
    """
    return VideoFile(path) if is_video_file(path) else open_image(path)


class VideoFile:
    """Frames of a file's first video stream, by number, in display order.

    Args:
        path: any format that FFmpeg reads.

    Raises:
        BrokenImage: no video, damaged at its beginning, or frames of too many pixels.
        MissingExtra: PyAV is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        with self._open() as container:
            stream = self._stream(container)
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MAX_PIXELS:
                limit = f"at most {MAX_PIXELS / 1e6:.0f} million are read"
                raise BrokenImage(self.path, f"frames of {width} x {height} pixels; {limit}: make them smaller")
            # timestamps of all packets, read without decoding: exact for any frame rate
            self.times = sorted({packet.pts for packet in self._guarded(container.demux(stream)) if packet.pts is not None})
        if not self.times:
            raise BrokenImage(self.path, "the video holds no frames")

    def __len__(self) -> int:
        return len(self.times)

    def read_frames(self, indices: Sequence[int]) -> list[Image.Image]:
        """Return RGB images, upright; a frame that cannot be decoded is replaced by the one before it.

        Args:
            indices: numbers below `len`, in ascending order; repetitions are allowed.

        Raises:
            BrokenImage: none of them can be decoded.
        """
        wanted = [self.times[i] for i in indices]
        found: dict[int, Image.Image] = {}
        with self._open() as container:
            stream = self._stream(container)
            stream.thread_type = "AUTO"
            if indices[0] > 0:
                container.seek(wanted[0], stream=stream)  # to the last key frame at or before it
            for frame in self._guarded(container.decode(stream)):
                if frame.pts in wanted or not found:
                    if frame.pts is not None and frame.pts < wanted[0] and frame.pts not in wanted:
                        continue  # decoded only to reach the first requested frame
                    image = frame.to_image()
                    found[frame.pts] = image.rotate(frame.rotation, expand=True) if getattr(frame, "rotation", 0) else image
                if frame.pts is not None and frame.pts >= wanted[-1]:
                    break
        if not found:
            raise BrokenImage(self.path, f"frame {indices[0]} and those after it cannot be decoded")
        times = sorted(found)
        return [found[times[max(0, bisect.bisect_right(times, time) - 1)]] for time in wanted]

    def _open(self) -> Any:
        av = require("av", "video")
        try:
            open_regular(self.path).close()
            return av.open(self.path, metadata_errors="ignore")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise BrokenImage(self.path, f"not a video that can be read ({error})") from error

    def _stream(self, container: Any) -> Any:
        if not container.streams.video:
            raise BrokenImage(self.path, "the file holds no video (only sound or text)")
        return container.streams.video[0]

    def _guarded(self, items: Any) -> Any:
        """Yield the items up to the first damaged one."""
        av = require("av", "video")
        try:
            yield from items
        except av.FFmpegError:
            return


def holds_clips(images: ImageSet) -> bool:
    """Return whether a set holds clips, by its first readable sample; a set without any is taken for images."""
    for index in range(len(images)):
        try:
            return not hasattr(images[index][0], "convert")
        except BrokenImage:
            continue
    return False


def still_of(image: Any) -> Image.Image:
    """Return an image for display: the image itself, or the middle frame of a clip."""
    if hasattr(image, "convert"):
        return image
    middle = len(image) // 2
    return image.read_frames([middle])[0] if hasattr(image, "read_frames") else image[middle]
