"""Claim: in the first stage, gates on wavelet coefficients are about as good as attention."""

from typing import Any

from vitarium.claims import Arm, Comparison, claim


@claim("svt", says="scattering in the first stage is about as good as attention there", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 32x32 under a stem of stride 4, 8x8 tokens; two stages, the second attends; the first scatters or attends. The same steps,
    recipe and seeds. Refuted where scattering is worse by more than a point."""
    common: dict[str, Any] = dict(image_size=32, steps=400, seeds=3, overrides={"mixing.mixup": 0})
    options = dict(dims=(16, 32), patch_size=4)
    arm = lambda label, mixers: Arm(label, "svt_pico", options=options | {"mixers": mixers}, **common)
    return [Comparison("scattering over attention", arm("scattering", "SA"), arm("attention", "AA"), at_least=-1.0)]
