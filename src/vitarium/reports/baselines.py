"""Baselines of a comparison that are no models: logistic regression on the pixels of a classifier's images."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitarium.data import ImageData
from vitarium.reports.looking import Looked

PIXELS = "logistic regression on pixels"
MOST_TRAINING = 8_000
"""Training images of the regression."""
MOST_PRODUCTS = 8e7
"""Images times pixels times classes; thumbnails are reduced until a step of the solver costs no more."""
STEPS = 100
"""Steps of the solver, each two products of that size."""
FEWEST = 10
"""Training images without which there is no regression."""


def pixel_regression(data: ImageData, looked: Looked) -> dict[str, Any] | None:
    """Return the accuracy of logistic regression on standardised thumbnails, or None where there are too few images or classes.

    It is trained on up to `MOST_TRAINING` training images that were looked at and measured on the held-out ones among them.

    Returns:
        {"name", "accuracy", "side": pixels, "train", "val": numbers of images}.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, val = np.flatnonzero(looked.part == 0)[:MOST_TRAINING], np.flatnonzero(looked.part == 1)
    known, asked = (np.array([part.targets[i] for i in looked.index[rows]]) for part, rows in ((data.train, train), (data.val, val)))
    if len(train) < FEWEST or not len(val) or len(np.unique(known)) < 2:
        return None
    pixels = _reduced(looked.thumbnails, len(train) * len(np.unique(known)))
    scaler = StandardScaler().fit(pixels[train])
    regression = LogisticRegression(C=0.01, max_iter=STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may stop before it converges
        regression.fit(scaler.transform(pixels[train]), known)
    accuracy = float((regression.predict(scaler.transform(pixels[val])) == asked).mean())
    side = round((pixels.shape[1] / (3 if _coloured(looked.thumbnails) else 1)) ** 0.5)
    return {"name": PIXELS, "accuracy": accuracy, "side": side, "train": len(train), "val": len(val)}


def _coloured(thumbnails: NDArray[np.uint8]) -> bool:
    return bool((thumbnails != thumbnails[..., :1]).any())


def _reduced(thumbnails: NDArray[np.uint8], rows: int) -> NDArray[np.float32]:
    """Return the pixels (N, features), gray where all images are, of a side that keeps the products below `MOST_PRODUCTS`."""
    pixels = thumbnails if _coloured(thumbnails) else thumbnails[..., :1]
    while pixels[0].size * rows > MOST_PRODUCTS and pixels.shape[1] >= 8:
        even = pixels.shape[1] // 2 * 2
        pixels = pixels[:, :even, :even].reshape(len(pixels), even // 2, 2, even // 2, 2, -1).mean((2, 4)).astype(np.uint8)
    return pixels.reshape(len(pixels), -1).astype(np.float32)
