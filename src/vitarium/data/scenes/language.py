"""Captions of scenes, and questions about them with answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from vitarium.data.scenes.layout import COLOURS, THINGS, Layout, Thing

QUESTIONS = ("count", "colour", "presence", "side", "nearer", "ground")


def caption(layout: Layout, things: Sequence[Thing]) -> str:
    """Return a caption: 'A red striped star in front of a blue ring and two more things, on grass, hills behind, under a cloudy sky.'"""
    first, *others = [_with_article(str(thing)) for thing in things]
    if len(others) > 2:
        others[1:] = [f"{len(others) - 1} more things"]
    behind = f" in front of {' and '.join(others)}" if others else ""
    hills = ", hills behind" if layout.hills else ""
    return f"{first[0].upper()}{first[1:]}{behind}, on {layout.ground}{hills}, under {_with_article(layout.sky)} sky."


def question_and_answer(layout: Layout, things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, str]:
    """Return a question with one right answer, of a kind that the scene allows; the answer is a word or a number."""
    counts = Counter(thing.kind for thing in things)
    single = [thing for thing in things if counts[thing.kind] == 1]
    kind = QUESTIONS[rng.integers(len(QUESTIONS))]
    if kind == "colour" and single:
        thing = single[rng.integers(len(single))]
        return f"What colour is the {thing.kind}?", thing.colour
    if kind in ("side", "nearer") and len(single) > 1:
        one, other = (single[i] for i in rng.permutation(len(single))[:2])
        if kind == "nearer":
            return f"Which is nearer, the {one.kind} or the {other.kind}?", min(one, other, key=lambda thing: thing.depth).kind
        return f"Is the {one.kind} left of the {other.kind}?", "yes" if one.x < other.x else "no"
    if kind == "presence":  # yes and no are equally frequent
        absent = [name for name in THINGS if name not in counts]
        names = absent if rng.random() < 0.5 else list(counts)
        name = names[rng.integers(len(names))]
        return f"Is there {_with_article(name)}?", "yes" if name in counts else "no"
    if kind == "ground":
        return "What do the things stand on?", layout.ground
    name = list(counts)[rng.integers(len(counts))]
    return f"How many {_plural(name)} are there?", str(counts[name])


ANSWERS = (*THINGS, *COLOURS, "yes", "no", "grass", "sand", "snow", "water", *map(str, range(1, 7)))
"""All possible answers, for models that choose among them."""


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"
