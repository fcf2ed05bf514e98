"""Duplicates among images: equal pixels, and near ones by a perceptual hash; those between the parts, and those with different labels.

A held-out image that also stands among the training images is leakage: the score counts it as new, and the model has seen it. Two equal
images with different labels contradict one another, and one of the labels is wrong.

Equal images have the same hash of their decoded pixels. Near ones (compressed or scaled copies) are found by the 64 bits of dHash: the
signs of the horizontal differences of a thumbnail of 9 x 8 gray pixels. Pairs that differ in at most `BITS` bits are candidates, and count
where their thumbnails agree up to `DIFFERENCE` of their contrast, so that merely similar drawings, such as digits, do not.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitarium.data import ImageData
from vitarium.reports.looking import Looked

BITS = 6
"""Bits of the hash in which candidates may differ."""
DIFFERENCE = 0.12
"""Root mean square of the difference of two thumbnails over their contrast, up to which they are near duplicates."""
FLAT = 3.0
"""Standard deviation of the gray values below which an image has no structure that a hash could compare."""
MOST_PAIRS = 500_000
"""Candidates that are compared."""
SHOWN = 5
"""Pairs that are named."""
BLOCK = 256


@dataclass(frozen=True)
class Duplicates:
    """Duplicates of a data set; counts are of the images that were looked at.

    Attributes:
        looked, total: images that were looked at, and all.
        equal, near: images that repeat an earlier one, pixel by pixel or nearly.
        leaked: held-out images with an equal or near training image.
        contradicting: images whose label differs from the most frequent one of their equals: the least number of wrong labels.
        leaks, contradictions, pairs: the first of each, {"first", "second", "kind"}; contradictions with "labels".
    """

    looked: int
    total: int
    equal: int = 0
    near: int = 0
    leaked: int = 0
    contradicting: int = 0
    leaks: list[dict[str, Any]] = field(default_factory=list)
    contradictions: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the values as plain values."""
        return asdict(self)

    def sentences(self) -> list[str]:
        """Return what a reader must know, a sentence each, the gravest first; none where there are no duplicates."""
        of = f"{self.looked:,} images" if self.looked == self.total else f"a sample of {self.looked:,} of {self.total:,} images"
        found = []
        if self.leaked:
            found.append(
                f"{self.leaked} held-out {_images(self.leaked)} also among the training images (of {of}), so scores are too good: "
                + _named(self.leaks)
            )
        if self.contradicting:
            have = _images(self.contradicting, "have", "has")
            found.append(f"{self.contradicting} {have} an equal one with another label: {_named(self.contradictions)}")
        if (repeated := self.equal + self.near) and not self.leaked:
            found.append(f"{repeated} {_images(repeated, 'repeat', 'repeats')} another one (of {of}): {_named(self.pairs)}")
        return found


def _images(count: int, verb: str = "are", one: str = "is") -> str:
    return f"images {verb}" if count != 1 else f"image {one}"


def _named(pairs: list[dict[str, Any]]) -> str:
    def words(pair: dict[str, Any]) -> str:
        sign = {"equal": "=", "near": "~"}[pair["kind"]]
        return f"{pair['first']} {sign} {pair['second']}" + (f" ({' / '.join(pair['labels'])})" if "labels" in pair else "")

    return "; ".join(map(words, pairs))


def find_duplicates(data: ImageData, looked: Looked) -> Duplicates:
    """Return the duplicates among the images that were looked at."""
    equal = _equal(looked.digests)
    near = _near(looked, {second for _, second in equal})
    targets = [_label((data.train, data.val)[part].targets, index) for part, index in zip(looked.part, looked.index, strict=True)]
    every = [*((a, b, "equal") for a, b in equal), *((a, b, "near") for a, b in near)]

    def pair(first: int, second: int, kind: str) -> dict[str, Any]:
        names = ((data.train, data.val)[looked.part[i]].describe(int(looked.index[i])) for i in (first, second))
        return dict(zip(("first", "second"), names, strict=True), kind=kind)

    leaks: dict[int, tuple[int, int, str]] = {}
    for a, b, kind in _across(looked, every):
        leaks.setdefault(b, (a, b, kind))
    against = _against(equal, targets)
    label = lambda i: data.classes[targets[i]] if targets[i] < len(data.classes) else str(targets[i])
    return Duplicates(
        looked=len(looked),
        total=looked.total,
        equal=len(equal),
        near=len({b for _, b in near}),
        leaked=len(leaks),
        contradicting=len(against),
        leaks=[pair(*leak) for leak in list(leaks.values())[:SHOWN]],
        contradictions=[dict(pair(a, b, "equal"), labels=[label(a), label(b)]) for a, b in against[:SHOWN]],
        pairs=[pair(*one) for one in every[:SHOWN]],
    )


def _against(equal: list[tuple[int, int]], targets: list[int]) -> list[tuple[int, int]]:
    """Return (image, image of another label) of equal images; the second are those that differ from their group's most frequent label.

    Their number does not depend on the order of the images.

    Args:
        equal: (first, other) for each image whose pixels an earlier one has.
        targets: class numbers; -1 where there is none.
    """
    groups: dict[int, list[int]] = {}
    for a, b in equal:
        groups.setdefault(a, [a]).append(b)
    found = []
    for group in groups.values():
        labelled = [i for i in group if targets[i] >= 0]
        if len({targets[i] for i in labelled}) > 1:
            [(usual, _)] = Counter(targets[i] for i in labelled).most_common(1)
            one = next(i for i in labelled if targets[i] == usual)
            found += [(one, i) for i in labelled if targets[i] != usual]
    return found


def _label(targets: Any, index: int) -> int:
    """Return a class number; -1 for targets of other kinds."""
    target = targets[index]
    return int(target) if isinstance(target, int | np.integer) else -1


def _equal(digests: list[bytes]) -> list[tuple[int, int]]:
    """Return (first, other) for each image whose pixels an earlier one has."""
    first: dict[bytes, int] = {}
    return [(first[digest], i) for i, digest in enumerate(digests) if first.setdefault(digest, i) != i]


def _across(looked: Looked, pairs: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Return (training image, held-out image, kind) of the duplicates between the parts; equality is transitive."""
    groups: dict[int, list[int]] = {}
    for a, b, kind in pairs:
        if kind == "equal":
            groups.setdefault(a, [a]).append(b)
    found: list[tuple[int, int, str]] = []
    for group in groups.values():
        first = next((i for i in group if not looked.part[i]), None)  # one for each: thousands of equal images would make millions of pairs
        found += [(first, i, "equal") for i in group if first is not None and looked.part[i]]
    for a, b, kind in pairs:
        if kind == "near" and looked.part[a] != looked.part[b]:
            found.append((b, a, kind) if looked.part[a] else (a, b, kind))
    return found


def _near(looked: Looked, repeated: set[int]) -> list[tuple[int, int]]:
    """Return pairs of near duplicates, without images that repeat another one exactly."""
    gray = looked.thumbnails.astype(np.float32).mean(-1) if len(looked) else np.empty((0, 1, 1), np.float32)
    contrast = gray.std((1, 2))
    kept = np.array([i for i in range(len(gray)) if i not in repeated and contrast[i] >= FLAT], np.int64)
    hashes, found, candidates = dhash(gray[kept]), [], 0
    for start in range(0, len(kept), BLOCK):
        agreement = hashes[start : start + BLOCK] @ hashes[start:].T  # 64 less twice the bits that differ
        rows, columns = np.nonzero(np.triu(agreement >= 64 - 2 * BITS, 1))
        a, b = kept[rows + start], kept[columns + start]
        room = MOST_PAIRS - candidates
        a, b, candidates = a[:room], b[:room], candidates + len(a)
        for i in range(0, len(a), 4096):
            one, two = a[i : i + 4096], b[i : i + 4096]
            apart_by = np.sqrt(np.square(gray[one] - gray[two]).mean((1, 2)))
            close = apart_by <= DIFFERENCE * np.minimum(contrast[one], contrast[two])
            found += list(zip(one[close].tolist(), two[close].tolist(), strict=True))
        if candidates >= MOST_PAIRS:
            break
    return found


def dhash(gray: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the 64 bits of each image, (N, 64) of -1 and 1: whether each of 8 x 8 cells is brighter than its right neighbour.

    Args:
        gray: (N, S, S), averaged over 8 rows of 9 cells.
    """
    rows, columns = (np.linspace(0, gray.shape[1], n + 1).round().astype(int) for n in (8, 9))
    sums = np.pad(gray.astype(np.float64).cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
    cells = np.diff(np.diff(sums[:, rows][:, :, columns], axis=1), axis=2) / np.maximum(1, np.outer(np.diff(rows), np.diff(columns)))
    return np.where(cells[:, :, :-1] > cells[:, :, 1:], 1, -1).reshape(len(gray), 64).astype(np.float32)
