"""ImageNet-C's fifteen kinds of corruption, five severities each (Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations", ICLR 2019).

    corrupt(image, "fog", severity=3, rng=np.random.default_rng(0))

At 224 pixels all numbers are the benchmark's. At other sizes lengths (radii, displacements, flakes) scale with the shorter side, so that a
corruption looks the same on a small image; noise stays per pixel. Motion blur reproduces ImageMagick's without needing it. The published
images were stored as JPEG once more, which is not done here. Frost blends photographs over the image; they are files of the package
imagecorruptions (the extra `corruptions`), whose code does not run on current libraries.

Notation: x (H, W, 3) float in 0..1, s severity 0..4, rng the generator, k the scale: shorter side / 224.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitarium.errors import MissingExtra, UsageError, nearest

Array = NDArray[Any]
Corruption = Callable[[Array, int, np.random.Generator, float], Array]

LUMA = np.array([0.299, 0.587, 0.114])


def gaussian_noise(x: Array, s: int, rng: np.random.Generator, k: float) -> Array:
    """Gaussian noise, as of a sensor in low light."""
    return x + rng.normal(size=x.shape, scale=(0.08, 0.12, 0.18, 0.26, 0.38)[s])


def shot_noise(x: Array, s: int, rng: np.random.Generator, k: float) -> Array:
    """Shot noise: a Poisson count of photons per value."""
    quanta = (60, 25, 12, 5, 3)[s]
    return rng.poisson(x * quanta) / quanta


def impulse_noise(x: Array, s: int, rng: np.random.Generator, k: float) -> Array:
    """Impulse noise: a share of the values becomes 0 or 1, as by bit errors."""
    drawn = rng.uniform(size=x.shape)
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[s]
    return np.where(drawn < share / 2, 0.0, np.where(drawn < share, 1.0, x))


def defocus_blur(x: Array, s: int, rng: np.random.Generator, k: float) -> Array:
    """Defocus blur: every point becomes a disc."""
    radius, sigma = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[s]
    half = max(8, radius)
    y, z = np.mgrid[-half : half + 1, -half : half + 1]
    disc = (y**2 + z**2 <= radius**2).astype(float)
    disc = _gaussian(disc / disc.sum(), sigma, truncate=(1 if radius <= 8 else 2) / sigma, mode="mirror")  # within one pixel, or two
    return _filtered(x, disc, k)


def glass_blur(x: Array, s: int, rng: np.random.Generator, k: float) -> Array:
    """Frosted glass: pixels are exchanged with neighbours."""
    sigma, reach, times = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[s]
    x = _gaussian_image(x, sigma * k)
    reach = max(1, round(reach * k))
    height, width = x.shape[:2]
    if min(height, width) <= 2 * reach:
        return x
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    places = (rows[:, None] * width + columns[None]).ravel().tolist()
    source = list(range(height * width))
    for _ in range(times):  # sequential, because the benchmark's exchanges build on one another
        steps = rng.integers(-reach, reach, size=(len(places), 2))
        for place, step in zip(places, (steps[:, 1] * width + steps[:, 0]).tolist(), strict=True):
            source[place] = source[place + step]
    return _gaussian_image(x.reshape(-1, 3)[source].reshape(x.shape), sigma * k)


def motion_blur(x: Array, s: int, rng: np.random.Generator, k: float) -> Array:
    """Motion blur along a random direction."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[s]
    return _filtered(x, _streak(radius, sigma, rng.uniform(-45, 45)), k, "edge")


def zoom_blur(x: Array, s: int, rng: np.random.Generator, k: float) -> Array:
    """Zoom blur: the mean of several magnifications."""
    factors = (np.arange(1, 1.11, 0.01), np.arange(1, 1.16, 0.01), np.arange(1, 1.21, 0.02), np.arange(1, 1.26, 0.02))
    zooms = (*factors, np.arange(1, 1.31, 0.03))[s]
    return (x + sum(_zoomed(x, factor) for factor in zooms)) / (len(zooms) + 1)


def snow(x: Array, s: int, rng: np.random.Generator, k: float) -> Array:
    """Snow: blurred flakes over a whitened image."""
    loc, scale, size, least, radius, sigma, kept = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[s]
    flakes = _zoomed(rng.normal(size=x.shape[:2], loc=loc, scale=scale)[..., None], max(1.0, size * k))
    flakes = np.where(flakes < least, 0.0, flakes).clip(0, 1)
    flakes = _filtered(flakes, _streak(radius, sigma, rng.uniform(-135, -45)), k, "edge")
    pale = kept * x + (1 - kept) * np.maximum(x, (x @ LUMA)[..., None] * 1.5 + 0.5)
    return pale + flakes + flakes[::-1, ::-1]


def frost(x: Array, s: int, rng: np.random.Generator, k: float) -> Array:
    """Frost: photographs of ice blended over the image."""
    mine, ice = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[s]
    photographs = frost_photographs()
    if not photographs:
        raise MissingExtra("frost needs the photographs of the package imagecorruptions: pip install 'vitarium[corruptions]'")
    layer = _frost(photographs[rng.integers(5)], k)  # the benchmark does not use the sixth photograph
    height, width = x.shape[:2]
    if layer.shape[0] <= height or layer.shape[1] <= width:
        grow = 1.1 * max(height / layer.shape[0], width / layer.shape[1])
        larger = Image.fromarray(layer).resize((math.ceil(layer.shape[1] * grow), math.ceil(layer.shape[0] * grow)))
        layer = np.asarray(larger)
    top, left = rng.integers(0, layer.shape[0] - height), rng.integers(0, layer.shape[1] - width)
    return mine * x + ice * layer[top : top + height, left : left + width] / 255


def fog(x: Array, s: int, rng: np.random.Generator, k: float) -> Array:
    """Fog: plasma noise from the diamond-square algorithm."""
    amount, decay = ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[s]
    height, width = x.shape[:2]
    clouds = _plasma(1 << (max(height, width) - 1).bit_length(), decay, rng)[:height, :width, None]
    return (x + amount * clouds) * x.max() / (x.max() + amount) if x.max() > 0 else x


def brightness(x: Array, s: int, rng: np.random.Generator, k: float) -> Array:
    """Brightness: the value channel of HSV is raised; hue and saturation are unchanged."""
    value = x.max(-1, keepdims=True)
    brighter = (value + (0.1, 0.2, 0.3, 0.4, 0.5)[s]).clip(0, 1)
    return np.where(value > 0, x * (brighter / np.where(value > 0, value, 1)), brighter)


def contrast(x: Array, s: int, rng: np.random.Generator, k: float) -> Array:
    """Contrast: values move towards the mean."""
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[s] + mean


def elastic_transform(x: Array, s: int, rng: np.random.Generator, k: float) -> Array:
    """Elastic transform: an affine map of three points, and a smooth field of displacements."""
    from scipy.ndimage import affine_transform, map_coordinates

    numbers = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))[s]
    alpha, sigma, jitter = (244 * number for number in numbers)
    alpha, sigma, jitter = alpha * k * _roughness(sigma) / _roughness(sigma * k), sigma * k, jitter * k
    shape = x.shape[:2]
    middle, third = np.array(shape) // 2, min(shape) // 3
    points = np.array([middle + third, [middle[0] + third, middle[1] - third], middle - third], dtype=float)
    moved = points + rng.uniform(-jitter, jitter, size=points.shape)
    points, moved = points[:, ::-1], moved[:, ::-1]  # from (x, y) to the (y, x) of arrays
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), points) if third else np.eye(3)[:, :2]  # rows: of y, of x, of 1
    x = np.stack([affine_transform(c, back[:2].T, back[2], order=1, mode="mirror") for c in np.moveaxis(x, -1, 0)], -1)
    shifts = [_gaussian(rng.uniform(-1, 1, size=shape), sigma, truncate=3, mode="reflect") * alpha for _ in range(2)]
    where = np.mgrid[: shape[0], : shape[1]] + np.stack(shifts[::-1])
    return np.stack([map_coordinates(c, where, order=1, mode="reflect") for c in np.moveaxis(x, -1, 0)], -1)


def pixelate(x: Array, s: int, rng: np.random.Generator, k: float) -> Array:
    """Pixelation: the image is shrunk and enlarged again."""
    share, (height, width) = (0.6, 0.5, 0.4, 0.3, 0.25)[s], x.shape[:2]
    fewer = _image(x).resize((max(1, int(width * share)), max(1, int(height * share))), Image.Resampling.BOX)
    return np.asarray(fewer.resize((width, height), Image.Resampling.BOX)) / 255


def jpeg_compression(x: Array, s: int, rng: np.random.Generator, k: float) -> Array:
    """JPEG compression at low quality."""
    file = io.BytesIO()
    _image(x).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[s])
    return np.asarray(Image.open(file)) / 255


KINDS: dict[str, Corruption] = {
    f.__name__: f
    for f in (
        *(gaussian_noise, shot_noise, impulse_noise),
        *(defocus_blur, glass_blur, motion_blur, zoom_blur),
        *(snow, frost, fog, brightness),
        *(contrast, elastic_transform, pixelate, jpeg_compression),
    )
}
"""Corruptions by name, in the benchmark's order: noise, blur, weather, digital."""

SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(image: Image.Image | Array, kind: str, severity: int, rng: np.random.Generator) -> Image.Image:
    """Return a corrupted copy of an image.

    Args:
        image: an image in any of Pillow's modes, or (H, W, 3) uint8.
        kind: a name in `KINDS`.
        severity: 1 to 5.
        rng: source of all random numbers.

    Returns:
        an RGB image of the same size.

    Raises:
        UsageError: unknown kind or severity.
        MissingExtra: frost without its photographs.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown corruption {kind!r}{nearest(kind, KINDS)} (accepted: {', '.join(KINDS)})")
    if severity not in SEVERITIES:
        raise UsageError(f"severity must be 1, 2, 3, 4 or 5, got {severity!r}")
    pixels = np.asarray(image if isinstance(image, np.ndarray) else image.convert("RGB"))
    x = pixels.astype(np.float64) / 255
    return _image(KINDS[kind](x, severity - 1, rng, min(x.shape[:2]) / 224))


def available_kinds() -> list[str]:
    """Return all fifteen kinds, or fourteen if the photographs of frost are not installed."""
    return [kind for kind in KINDS if kind != "frost" or frost_photographs()]


@functools.cache
def frost_photographs() -> tuple[Path, ...]:
    """Return the photographs in the package imagecorruptions, without importing it; none if it is not installed."""
    found = importlib.util.find_spec("imagecorruptions")
    folders = [Path(place) / "frost" for place in (found.submodule_search_locations or [])] if found else []
    return tuple(sorted(file for folder in folders for file in folder.glob("frost*.*")))


@functools.lru_cache(maxsize=16)
def _frost(file: Path, k: float) -> Array:
    """Return a photograph at the scale of the image, uint8."""
    photograph = Image.open(file).convert("RGB")
    size = (max(1, round(photograph.width * k)), max(1, round(photograph.height * k)))
    return np.asarray(photograph.resize(size) if k != 1 else photograph)


def _image(x: Array) -> Image.Image:
    return Image.fromarray((x * 255).clip(0, 255).astype(np.uint8))


def _gaussian(x: Array, sigma: float, *, truncate: float = 4.0, mode: str = "nearest") -> Array:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, sigma, truncate=truncate, mode=mode)


def _roughness(sigma: float) -> float:
    """Return the standard deviation of white noise after `_gaussian` with this sigma in two dimensions."""
    reach = math.ceil(3 * sigma) + 1
    return float((_gaussian(np.eye(1, 2 * reach + 1, reach)[0], sigma, truncate=3) ** 2).sum())


def _gaussian_image(x: Array, sigma: float) -> Array:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _filtered(x: Array, kernel: Array, k: float, border: Literal["reflect", "edge"] = "reflect") -> Array:
    """Correlate each channel of (H, W, C) with a kernel defined at 224 pixels."""
    from scipy.signal import fftconvolve

    kernel = _shrunk(kernel, k)
    height, width = kernel.shape
    padded = np.pad(x, ((height // 2,) * 2, (width // 2,) * 2, (0, 0)), mode=border)
    return fftconvolve(padded, kernel[::-1, ::-1, None], mode="valid", axes=(0, 1))


def _shrunk(kernel: Array, k: float) -> Array:
    """Scale a kernel of odd sides by k: each weight moves to its scaled position, shared among the pixels around it."""
    if k == 1:
        return kernel
    half = [(side - 1) // 2 for side in kernel.shape]
    reach = [math.ceil(h * k) + 1 for h in half]
    result = np.zeros([2 * r + 1 for r in reach])
    y, x = (np.arange(-h, h + 1) * k + r for h, r in zip(half, reach, strict=True))
    for row, share_y in ((np.floor(y).astype(int), 1 - y % 1), (np.floor(y).astype(int) + 1, y % 1)):
        for column, share_x in ((np.floor(x).astype(int), 1 - x % 1), (np.floor(x).astype(int) + 1, x % 1)):
            np.add.at(result, np.ix_(row.clip(max=2 * reach[0]), column.clip(max=2 * reach[1])), kernel * np.outer(share_y, share_x))
    return result


def _streak(radius: int, sigma: float, angle: float) -> Array:
    """Return half a Gaussian along a line from the centre, the kernel of a motion in a direction given in degrees."""
    count = 2 * radius + 1
    weights = np.exp(-(np.arange(count) ** 2) / (2 * sigma**2))
    kernel = np.zeros((2 * count + 1, 2 * count + 1))
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    for i, weight in enumerate(weights / weights.sum()):
        kernel[count + math.ceil(i * sine - 0.5), count + math.ceil(i * cosine - 0.5)] += weight
    return kernel


def _zoomed(x: Array, factor: float) -> Array:
    """Enlarge the centre of (H, W, C) by a factor and crop it to the same size."""
    from scipy.ndimage import zoom

    height, width = x.shape[:2]
    part = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - part[0]) // 2, (width - part[1]) // 2
    larger = zoom(x[top : top + part[0], left : left + part[1]], (factor, factor, 1), order=1)
    top, left = (larger.shape[0] - height) // 2, (larger.shape[1] - width) // 2
    return larger[top : top + height, left : left + width]


def _plasma(size: int, decay: float, rng: np.random.Generator) -> Array:
    """Return clouds (size, size) in 0..1 by the diamond-square algorithm on a torus; size is a power of two."""
    height, step, strength = np.zeros((size, size)), size, 100.0

    def mean_of(four: Array) -> Array:
        return four / 4 + strength * rng.uniform(-strength, strength, four.shape)

    while step >= 2:
        half = step // 2
        corners = height[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        height[half::step, half::step] = mean_of(pairs + np.roll(pairs, -1, 1))
        middles = height[half::step, half::step]
        height[::step, half::step] = mean_of(middles + np.roll(middles, 1, 0) + corners + np.roll(corners, -1, 1))
        height[half::step, ::step] = mean_of(middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 0))
        step, strength = half, strength / decay
    height -= height.min()
    return height / max(height.max(), 1e-12)
