"""VAR's tokenizer and transformer as one generator: sampling, editing, the released variants, renaming of the authors' parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import create_model, family, rename
from vitarium.catalog.calling import random_integers
from vitarium.errors import InputError, UsageError, nearest
from vitarium.generation.labels import check_labels
from vitarium.generation.noise import ImageNoise, numbered
from vitarium.generation.var.tokenizer import OFFICIAL as TOKENIZER_OFFICIAL
from vitarium.generation.var.tokenizer import PREPARATION
from vitarium.generation.var.transformer import ScaleTransformer, Steps
from vitarium.nn.inputs import check_classes
from vitarium.nn.modes import evaluating

GUIDANCE = 2.5
"""Guidance at the last scale; the authors' cfg = 1.5 is this minus 1."""

_TRANSFORMER = rename(
    (r"lvl_1L$|attn_bias_for_masking$", None),
    (r"^pos_start$", "start"),
    (r"^pos_1LC$", "positions"),
    (r"^class_emb\.", "class_embed."),
    (r"^lvl_embed\.", "level_embed."),
    (r"^shared_ada_lin\.1\.", "shared_ada."),
    (r"^head_nm\.ada_lin\.1\.", "head_ada."),
    (r"^blocks\.(\d+)\.ada_lin\.1\.", r"blocks.\1.ada."),
    (r"^blocks\.(\d+)\.ada_gss$", r"blocks.\1.ada_table"),
    (r"^blocks\.(\d+)\.attn\.mat_qkv\.", r"blocks.\1.attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.scale_mul_1H11$", r"blocks.\1.attn.log_scale"),
    (r"^blocks\.(\d+)\.attn\.zero_k_bias$", r"blocks.\1.attn.k_bias"),
    (r"^blocks\.(\d+)\.ffn\.", r"blocks.\1.mlp."),
)
_STRIP = rename((r"^(?:vae|var)\.", ""))
_CODEC = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' parameters, from the transformer's file, the tokenizer's, or both together."""
    state = _STRIP(state)
    codec = TOKENIZER_OFFICIAL({name: tensor for name, tensor in state.items() if name.startswith(_CODEC)})
    rest = _TRANSFORMER({name: tensor for name, tensor in state.items() if not name.startswith(_CODEC)})
    return {f"tokenizer.{name}": t for name, t in codec.items()} | {f"transformer.{name}": t for name, t in rest.items()}


def _released(depth: int) -> dict[str, tuple[str, ...]]:
    place = "hf:FoundationVision/var/"
    return {"in1k": (f"{place}var_d{depth}.pth + {place}vae_ch160v4096z32.pth",)}


def _row(depth: int, **others: Any) -> dict[str, Any]:
    return dict(depth=depth, embed_dim=64 * depth, num_heads=depth, drop_path_rate=0.1 * depth / 24, image_size=256) | others


@family(
    "var",
    variants={
        "pico": dict(depth=3, embed_dim=64, num_heads=4, tokenizer="var_tokenizer_pico", num_classes=10, image_size=16),
        "d16": _row(16),  # 310 M, FID 3.55 (256 pixels, ImageNet)
        "d20": _row(20),  # 601 M, 2.95
        "d24": _row(24, init_gate=1e-4),  # 1.0 B, 2.33
        "d30": _row(30, init_gate=1e-5),  # 2.0 B, 1.97
        "d36": _row(36, init_gate=5e-6, tokenizer="var_tokenizer_512", shared_modulation=True, image_size=512),  # 2.3 B, 2.63 at 512 pixels
    },
    official=official,
    weights={f"d{depth}": _released(depth) for depth in (16, 20, 24, 30, 36)},
    learner="var",
    **PREPARATION,
)
class VAR(nn.Module):
    """VAR: image (B, in_chans, H, W) in [-1, 1] and class (B,) -> logits of all its codes (B, L, V). See `generate` and `edit`.

    Args:
        depth, embed_dim, num_heads, mlp_ratio, drop_path_rate, shared_modulation, cosine_attention, init_gate: see `ScaleTransformer`.
        tokenizer: name of the model that encodes images into maps of codes; it becomes a frozen submodule.
        tokenizer_arguments: arguments of its constructor that differ from its variant's.
        num_classes: number of classes.
        image_size: side of the images, pixels; fixed by the tokenizer, and checked against it.

    Raises:
        ValueError: the tokenizer is for another image_size, or embed_dim is not a multiple of num_heads.
    """

    tokenizer: Any
    scales: tuple[int, ...]

    def __init__(
        self,
        *,
        depth: int,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        shared_modulation: bool = False,
        cosine_attention: bool = True,
        init_gate: float = 1e-3,
        tokenizer: str = "var_tokenizer_256",
        tokenizer_arguments: Mapping[str, Any] | None = None,
        num_classes: int = 1000,
        image_size: int | None = None,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.tokenizer = create_model(tokenizer, **(tokenizer_arguments or {})).requires_grad_(False)
        self.preprocessing = self.tokenizer.preprocessing
        self.in_chans, self.image_size, self.scales = self.tokenizer.in_chans, self.tokenizer.image_size, self.tokenizer.scales
        if image_size not in (None, self.image_size):
            raise ValueError(f"{tokenizer} is for images of image_size={self.image_size}, got image_size={image_size}")
        self.transformer = ScaleTransformer(
            [p * p for p in self.scales],
            self.tokenizer.code_dim,
            self.tokenizer.vocab_size,
            num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            shared_modulation=shared_modulation,
            cosine_attention=cosine_attention,
            init_gate=init_gate,
        )

    def forward(self, image: Tensor, labels: Tensor) -> Tensor:
        self.tokenizer.check_image(image)
        check_classes(self, labels, image.shape[0], self.num_classes, image.device)
        with torch.no_grad():
            views = self.tokenizer.inputs(self.tokenizer.encode(image))
        return self.transformer(views, labels)

    def example_inputs(self, n: int = 1, image_size: int | tuple[int, int] | None = None, *, seed: int = 0) -> dict[str, Tensor]:
        """Return image (n, in_chans, H, W) in [-1, 1], of the tokenizer's size, and labels (n,) below num_classes.

        Raises:
            UsageError: another size; the tokenizer fixes it.
        """
        return self.tokenizer.example_inputs(n, image_size, seed=seed) | {
            "labels": random_integers(self, (n,), self.num_classes, seed=seed)
        }

    def no_weight_decay(self) -> set[str]:
        """Return the authors' list of parameters without weight decay: embeddings, positions, scales of attention, tables of modulation."""
        tables = ("start", "positions", "class_embed.weight", "level_embed.weight")
        return {f"transformer.{name}" for name in (*tables, "blocks.*.attn.log_scale", "blocks.*.ada_table")}

    def generate(
        self,
        labels: Tensor,
        *,
        seed: int = 0,
        indices: Tensor | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Generate images of the given classes, (B, in_chans, H, W) float32 in [0, 1].

        Args:
            labels: class numbers (B,); `num_classes` is the null class.
            seed: of all random numbers.
            indices: numbers (B,) of the images in a longer list, see `Generator`. None: 0, 1, ...
            guidance: strength of classifier-free guidance at the last scale, to which it rises linearly from 1 at the first; 1 is none.
                None: 2.5 (the authors' cfg = 1.5).
            steps: one per scale; no other number is accepted.
            options: top_k (900), number of likeliest codes from which one is drawn; 0: all; 1: always the likeliest. top_p (0.96), smallest
                set of codes with this probability; 0 or 1: all. smooth (false), mix codes by Gumbel-softmax instead of sampling one,
                which gives smoother images, not better numbers (an option of the authors). cache (true), keep keys and values of
                earlier scales; without it the same images take longer.

        Raises:
            UsageError: unknown option or invalid value.
        """
        sampling = self._options(labels, seed=seed, guidance=guidance, steps=steps, **options)
        with evaluating(self, inference=True):
            image = self._sample(labels.to(self._device()), numbered(labels, indices), **sampling)
        return image.clone()

    def edit(
        self,
        image: Tensor,
        mask: Tensor,
        labels: Tensor,
        *,
        seed: int = 0,
        indices: Tensor | None = None,
        paste: bool = True,
        **options: Any,
    ) -> Tensor:
        """Generate a region of images: in-painting, out-painting (mask the border), or change of an object.

        At each scale the image's own codes are kept outside the mask, so that the new content fits them.

        Args:
            image: (B, in_chans, H, W) or (1, ...), in [0, 1].
            mask: (B, 1, H, W) or (1, 1, H, W), nonzero where new pixels are generated.
            labels: class numbers (B,), `num_classes` for no class.
            seed, indices: as for `generate`.
            paste: whether to restore the image's own pixels outside the mask; False: as decoded from the codes.
            options: as for `generate`.

        Returns:
            (B, in_chans, H, W) float32 in [0, 1].

        Raises:
            InputError: image or mask of another shape or range.
            UsageError: unknown option or invalid value.
        """
        image, mask = self._checked_edit(image, mask, len(labels))
        sampling = self._options(labels, seed=seed, **options)
        with evaluating(self, inference=True):
            codes = self.tokenizer.encode(2 * image - 1)
            kept = [self._kept(mask, p) for p in self.scales]
            made = self._sample(labels.to(self._device()), numbered(labels, indices), **sampling, codes=codes, kept=kept)
            made = torch.where(mask, made, image.float()) if paste else made
        return made.clone()

    def reconstructions(self, image: Tensor) -> Tensor:
        """Decode an image (B, in_chans, H, W) in [-1, 1] from its first 1, 2, ... K scales: (K, B, in_chans, H, W) in [0, 1]."""
        with evaluating(self, inference=True):
            totals = self.tokenizer.totals(self.tokenizer.encode(image))
            stages = torch.stack([self.tokenizer.to_image(total) for total in totals])
        return (stages.float() + 1) / 2

    # ---- sampling

    def _sample(
        self,
        labels: Tensor,
        numbers: Tensor,
        *,
        seed: int,
        guidance: float,
        top_k: int,
        top_p: float,
        smooth: bool,
        cache: bool,
        codes: Sequence[Tensor] | None = None,
        kept: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Sample scale by scale; `codes` (B, p^2) of each scale are used where `kept` (B, p^2) is true."""
        quantizer, count, last = self.tokenizer.quantizer, len(labels), len(self.scales) - 1
        noise = ImageNoise(seed, numbers)
        guided = guidance != 1
        steps = Steps(self.transformer, torch.cat([labels, torch.full_like(labels, self.num_classes)]) if guided else labels, cache)
        total: Tensor | None = None
        for k in range(len(self.scales)):
            view = None if total is None else quantizer.view(total, k)
            logits = steps.next(view.repeat(2, 1, 1) if view is not None and guided else view)
            logits = logits.float() if logits.dtype.itemsize < 4 else logits
            share = k / max(last, 1)
            if guided:
                strength = 1 + (guidance - 1) * share
                logits = strength * logits[:count] + (1 - strength) * logits[count:]
            chosen = draw(logits, noise.uniform(logits.shape[1]), top_k, top_p)
            if smooth:
                vectors = (
                    _mixed(logits, noise.exponential(*logits.shape[1:]), share).to(quantizer.codebook.weight.dtype)
                    @ quantizer.codebook.weight
                )
            else:
                vectors = quantizer.codebook(chosen)
            if codes is not None and kept is not None:
                vectors = torch.where(kept[k][..., None], quantizer.codebook(codes[k]), vectors)
            detail = quantizer.detail(vectors, k)
            total = detail if total is None else total + detail
        assert total is not None
        return (self.tokenizer.to_image(total).float() + 1) / 2

    def _kept(self, mask: Tensor, side: int) -> Tensor:
        """Return where a scale keeps the image's codes, (B, side^2), by the authors' rule; a single code for the whole image is kept."""
        keep = 1 - F.adaptive_max_pool2d(mask.float(), self.scales[-1])
        keep = F.interpolate(keep, (side, side), mode="bilinear").flatten(1) > 0.5
        return keep if side > 1 else torch.ones_like(keep)

    # ---- checks of arguments

    def _device(self) -> torch.device:
        return self.transformer.start.device

    def _options(self, labels: Tensor, **options: Any) -> dict[str, Any]:
        known = [name for name, p in inspect.signature(self._checked).parameters.items() if p.kind is p.KEYWORD_ONLY]
        if unknown := sorted(set(options) - set(known)):
            raise UsageError(f"VAR has no option {unknown[0]!r}{nearest(unknown[0], known)} (it has {', '.join(known)})")
        return self._checked(labels, **options)

    def _checked(
        self,
        labels: Tensor,
        *,
        seed: int = 0,
        guidance: float | None = None,
        steps: int | None = None,
        top_k: int = 900,
        top_p: float = 0.96,
        smooth: bool = False,
        cache: bool = True,
    ) -> dict[str, Any]:
        """Return the options of sampling with their defaults, for `_sample`."""
        guidance = GUIDANCE if guidance is None else guidance
        check_labels(labels, self.num_classes, null=True)
        if steps not in (None, len(self.scales)):
            raise UsageError(f"VAR takes one step per scale, here {len(self.scales)}; got steps={steps}")
        for name, value, high in (("guidance", guidance, 100), ("top_p", top_p, 1)):
            if not isinstance(value, int | float) or not 0 <= value <= high:
                raise UsageError(f"{name} must be a number from 0 to {high}, got {value!r}")
        for name, number in (("top_k", top_k), ("seed", seed)):
            if not isinstance(number, int) or number < 0:
                raise UsageError(f"{name} must be a whole number of at least 0, got {number!r}")
        for name, switch in (("smooth", smooth), ("cache", cache)):
            if not isinstance(switch, bool):
                raise UsageError(f"{name} must be true or false, got {switch!r}")
        return dict(seed=seed, guidance=guidance, top_k=top_k, top_p=top_p, smooth=smooth, cache=cache)

    def _checked_edit(self, image: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
        side = self.image_size
        for name, given, channels in (("image", image, self.in_chans), ("mask", mask, 1)):
            if given.ndim != 4 or len(given) not in (1, count) or tuple(given.shape[1:]) != (channels, side, side):
                raise InputError(f"the {name} must be ({count} or 1, {channels}, {side}, {side}), got {tuple(given.shape)}")
        if not image.is_floating_point() or image.min() < 0 or image.max() > 1:
            raise InputError("the image must be floating-point numbers in [0, 1]")
        weight = self.transformer.start
        return image.to(weight).expand(count, -1, -1, -1), (mask != 0).to(weight.device).expand(count, -1, -1, -1)


def draw(logits: Tensor, uniform: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Draw a code for each position, (B, n, V) -> (B, n): among the `top_k` likeliest, and in the smallest set of probability `top_p`.

    Args:
        uniform: numbers (B, n) in [0, 1), float64, each of which selects a code from the cumulative probabilities.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    if 0 < top_p < 1:
        ordered, order = logits.sort(-1)
        tail = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        tail[..., -1] = False
        logits = logits.masked_fill(tail.scatter(-1, order, tail), -torch.inf)
    sums = logits.softmax(-1).to(torch.float32 if logits.device.type == "mps" else torch.float64).cumsum(-1)
    places = uniform.to(sums)[..., None] * sums[..., -1:]
    return torch.searchsorted(sums, places, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _mixed(logits: Tensor, exponential: Tensor, share: float) -> Tensor:
    """Return weights of the codes, (B, n, V): Gumbel-softmax whose temperature falls with `share` from 0 to 1, as the authors'."""
    temperature = max(0.27 * (1 - 0.95 * share), 0.005)
    gumbel = -exponential.to(logits).clamp(min=torch.finfo(torch.float32).tiny).log()
    return ((logits * (1 + share) + gumbel) / temperature).softmax(-1)
