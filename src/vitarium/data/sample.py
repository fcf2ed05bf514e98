"""One sample as named fields. Imports nothing heavy; how fields are collated is in `vitarium.data.fields`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Sample(dict[str, Any]):
    """One sample as a mapping of named fields: image, target, views, clip, text, mask, pose, ... A missing field has no key."""

    def map(self, **functions: Callable[[Any], Any]) -> Sample:
        """Return a sample in which each function was applied to the field of its name, where the sample has it."""
        return Sample(self | {name: function(self[name]) for name, function in functions.items() if name in self})
