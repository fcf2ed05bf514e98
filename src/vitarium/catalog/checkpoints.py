"""Loading of weights with the tensor names of several codebases, with a report; the model is unchanged unless everything fits.

report = load_checkpoint(model, "swin_tiny_patch4_window7_224.pth")
print(report)
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vitarium.catalog.heads import mark_fresh
from vitarium.catalog.imagenet import BY_NAME, CLASSES_1K, CLASSES_22K, head_of_1k
from vitarium.catalog.rebuilding import refuse_files
from vitarium.catalog.registry import Family, Renamer, families, find_model
from vitarium.catalog.states import State, Weights, read_state, read_weights
from vitarium.catalog.weights import TOGETHER, fetch
from vitarium.errors import CheckpointError, UsageError

__all__ = ["LoadReport", "load_checkpoint", "read_state"]

log = logging.getLogger("vitarium")

OURS = "ours"
"""The dialect of files that use our names."""
SHOWN = 5
"""Number of names listed per kind in a report."""


@dataclass(frozen=True)
class LoadReport:
    """Outcome of loading a file, per tensor. Lists hold names of the model; `unexpected` holds names after renaming."""

    source: str
    dialect: str = OURS
    """Dialect of the file's names: "ours", or a key of the family's dialects such as "official"."""
    opened: list[str] = field(default_factory=list)
    """Containers and prefixes around the weights in the file."""
    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    """Tensors resized to the model, each as "name (169, 3) -> (529, 3)"; they count as loaded."""
    head: str = ""
    """Reason why the head was not loaded, "" if it was (or if neither side has one)."""
    mismatched: list[str] = field(default_factory=list)
    """Tensors of another shape or kind, each as "name (96, 3) -> (128, 3)"; not loaded."""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    names_classes: bool = False
    """True if the file names the classes of its head."""

    @property
    def complete(self) -> bool:
        """Return whether every tensor of the model (except a head of other classes) was filled and no tensor of the file is left."""
        return not (self.mismatched or self.missing or self.unexpected)

    @property
    def filled(self) -> int:
        """Number of the model's tensors that the file fills."""
        return len(self.matched) + len(self.resized)

    @property
    def known(self) -> int:
        """Number of the model's tensor names that the file has."""
        return self.filled + len(self.mismatched)

    def __str__(self) -> str:
        names = "" if self.dialect == OURS else f", renamed from {self.dialect} names"
        inside = f", found inside {' '.join(self.opened)}" if self.opened else ""
        lines = [f"{self.source}: {self.filled} of {self.known + len(self.missing)} tensors loaded{names}{inside}"]
        for kind in ("resized", "mismatched", "missing", "unexpected"):
            if found := getattr(self, kind):
                rest = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
                lines.append(f"  {kind} ({len(found)}): {', '.join(found[:SHOWN])}{rest}")
        if self.head:
            lines.append(f"  head: {self.head}")
        if not self.complete:
            lines.append(f"  likely cause: {self._cause()}")
        return "\n".join(lines)

    def _cause(self) -> str:
        if self.known == 0:
            return "a file of another architecture, or of a codebase whose names are not supported"
        if self.mismatched:
            return "the same architecture in another size or with other arguments"
        if self.missing and self.unexpected:
            return "a related architecture, or one created with other arguments"
        return "the file holds only a part of the model" if self.missing else "the file holds more than this model"


def load_checkpoint(
    model: nn.Module,
    source: str | Path | Weights,
    *,
    strict: bool = True,
    follow_head: bool = False,
    quiet: bool = False,
    classes: Sequence[str] | None = None,
) -> LoadReport:
    """Load weights into a model from a file with our names or those of the authors, timm, torchvision or transformers.

    All renamers of the model's family are tried, and the one that fits most tensors is used. A head with another number of classes is not
    loaded, except that of ImageNet-22K (21,841 classes) by a model of 1,000 classes, which gets the rows of ImageNet-1K
    (`vitarium.catalog.imagenet`); nor is one of as many other classes, where both sides name theirs; rows of the same classes are put into
    the model's order. Position tables are resized if the model supports it (`Backbone.resize_tensor`); a first convolution for other
    channels is summed or repeated. The model keeps its dtype and device, and is unchanged if anything fails.

    Args:
        model: a model from `create_model`, or any module with the file's tensor names.
        source: a path, "hf:owner/name[/file]", or an http(s) address, optionally with "#sha256=HEX"; several joined by " + " if the model's
            parts were released in separate files; or weights that `read_weights` has read.
        strict: raise for a file that lacks tensors or has unexpected ones (except the head's).
        follow_head: first set the model's number of classes to the file's.
        quiet: do not log the report.
        classes: names of the model's classes, in order; None: `model.labels`, which a model without names takes from the file.

    Raises:
        CheckpointError: the file is unreadable, unsafe or unreachable; or it is of another model: then the message has the report and the
            models that it fits.
    """
    refuse_files(f"the weights {source}")
    weights = source if isinstance(source, Weights) else read_together(str(source))
    source = str(weights.path) if isinstance(source, Weights) else source
    fits = [
        _fit(model, state, LoadReport(str(source), dialect, weights.opened)) for dialect, state in _readings(dialects_of(model), weights)
    ]
    best = max(fits, key=_Fit.quality)
    report = best.report
    if report.filled == 0 or (strict and not report.complete):
        raise CheckpointError(_refusal(model, report, weights))
    if not follow_head:
        best = _with_1k_head(model, best)
        report = best.report
    if follow_head and best.classes is not None and best.classes != getattr(model, "num_classes", best.classes):
        model.reset_classifier(best.classes)  # type: ignore[operator]
        best = _fit(model, best.state, LoadReport(str(source), report.dialect, weights.opened))
        report = best.report
    report = replace(report, names_classes=weights.labels is not None)
    removed, head = _match_rows(model, best, weights.labels, classes)
    report = replace(report, head=head)
    model.load_state_dict(best.ready, strict=False)
    if fresh := _fresh_heads(_heads(model), model.state_dict(), best.state) | removed:
        mark_fresh(model, fresh, f"{source} {'holds a head of other classes' if best.classes else 'holds none'}")
    elif best.tune:
        mark_fresh(model, best.tune, "the authors' list of its classes in the file is for fine-tuning and partly one class off")
    model.weights_from = str(Path(source).resolve()) if Path(source).exists() else str(source)  # type: ignore[assignment]
    if not quiet:
        log.log(logging.WARNING if report.resized or report.head or not report.complete else logging.INFO, "%s", report)
    return report


def _match_rows(model: nn.Module, best: _Fit, theirs: list[str] | None, classes: Sequence[str] | None) -> tuple[set[str], str]:
    """Put the rows of the file's head, and of its embeddings of classes, into the order of the model's classes, or leave them out where
    these are others; give the file's names to a model without.

    Returns:
        names of the head's tensors that are left out, and the report's remark on the head.
    """
    named = classes if classes is not None else getattr(model, "labels", None)
    count, heads = getattr(model, "num_classes", 0), _heads(model)
    rows = [n for n in best.ready if n.startswith(tuple(heads)) or n in _class_embeddings(model)]
    if theirs is None or len(theirs) != count or not rows:
        return set(), best.report.head
    if named is None:
        model.labels = list(theirs)  # type: ignore[assignment]
        return set(), best.report.head
    mine = list(named)
    if theirs == mine or len(mine) != count:
        return set(), best.report.head
    if sorted(theirs) == sorted(mine):
        order = [theirs.index(name) for name in mine]
        for name in rows:
            if (size := best.ready[name].shape[0] if best.ready[name].ndim else 0) in (count, count + 1):
                best.ready[name] = best.ready[name][[*order, *range(count, size)]]
        return set(), "loaded, with its rows in the order of the model's classes"
    for name in rows:
        del best.ready[name]
    left = ", ".join(theirs[:5]) + (", ..." if count > 5 else "")
    return {n for n in rows if n.startswith(tuple(heads))}, f"left as it was: the file's {count} classes are others ({left})"


def _class_embeddings(model: nn.Module) -> set[str]:
    """Return the weights of the embeddings of classes that a generator takes as inputs."""
    count = getattr(model, "num_classes", 0)
    names = ("label_embed", "class_embed", "embed")
    return {
        f"{name}.weight"
        for name, part in model.named_modules()
        if isinstance(part, nn.Embedding) and name.rpartition(".")[2] in names and part.num_embeddings in (count, count + 1)
    }


def read_together(source: str) -> Weights:
    """Read the weights of a source, or of several joined by " + " as one."""
    if Path(source).exists() or TOGETHER not in source:
        return read_weights(fetch(source))
    parts = [read_weights(fetch(part.strip())) for part in source.split(TOGETHER)]
    state: State = {}
    for part in parts:
        if twice := sorted(state.keys() & part.forms[-1].keys()):
            raise CheckpointError(f"{part.path} and a file before it both hold {twice[0]}; join only files of different parts")
        state |= part.forms[-1]
    labels = next((part.labels for part in parts if part.labels), None)
    return replace(parts[0], labels=labels, forms=[state], opened=[name for part in parts for name in part.opened])


def _refusal(model: nn.Module, report: LoadReport, weights: Weights) -> str:
    name = getattr(getattr(model, "spec", None), "name", type(model).__name__)
    others = [other for other in models_that_fit(weights, near=name) if other != name]
    advice = f"this looks like {' or '.join(others[:3])}: create that model" if others else "choose the model that the file was made for"
    partly = ", or pass strict=False to load what fits" if report.filled else ""
    return f"the weights do not fit {name}; {advice}{partly}\n{report}"


# ---- readings of the names


def _readings(dialects: Mapping[str, Renamer], weights: Weights) -> Iterator[tuple[str, State]]:
    """Yield (dialect, state in our names) for every way to read the file; ours first."""
    for dialect, renamer in {OURS: dict, **dialects}.items():
        for form in weights.forms:
            # a renamer that fails on these names is for another dialect
            with contextlib.suppress(ValueError, LookupError, RuntimeError, TypeError, AttributeError):
                yield dialect, renamer(dict(form))


def dialects_of(model: nn.Module) -> Mapping[str, Renamer]:
    """Return the renamers for a model: those of its family, or of the library that it comes from."""
    name = getattr(getattr(model, "spec", None), "name", "")
    if name.startswith(("timm/", "hf/")):
        from vitarium.catalog.foreign import dialects_of_foreign

        return dialects_of_foreign(model)
    try:
        return find_model(name)[0].dialects
    except UsageError:  # a user's module
        return {}


# ---- comparison with the model


@dataclass
class _Fit:
    """One reading of the file, compared with the model without changing it."""

    state: State
    report: LoadReport
    ready: State
    """Model's name -> tensor of the model's shape."""
    classes: int | None
    """Number of classes of the file's head; 0 if it has none, None if unknown."""
    tune: list[str] = field(default_factory=list)
    """Tensors of the head whose values are only a start for training."""

    def quality(self) -> tuple[int, int, int]:
        """Sort key, larger is better: exact tensors, then known names, then fewest left over."""
        r = self.report
        return len(r.matched), r.known, -len(r.unexpected)


def _fit(model: nn.Module, state: State, blank: LoadReport) -> _Fit:
    wanted = model.state_dict()
    heads, first = _heads(model), _first_convolution(model)
    ready: State = {}
    report = replace(blank, matched=[], resized=[], mismatched=[], missing=[], unexpected=[])
    fresh = _fresh_heads(heads, wanted, state)
    for name, target in wanted.items():
        if name in fresh:
            continue
        if name not in state:
            if not name.endswith("num_batches_tracked"):  # older files lack these tensors, which are not needed
                report.missing.append(name)
            continue
        tensor = state[name]
        change = f"{name} {tuple(tensor.shape)} -> {tuple(target.shape)}"
        if tensor.is_floating_point() != target.is_floating_point():
            report.mismatched.append(f"{change} ({tensor.dtype} for {target.dtype})")
        elif tensor.shape == target.shape:
            ready[name] = tensor
            report.matched.append(name)
        elif (fitted := _resized(model, name, tensor, target.shape, is_first=name == first)) is not None:
            ready[name] = fitted
            report.resized.append(change)
        else:
            report.mismatched.append(change)
    report.unexpected.extend(n for n in state if n not in wanted and not n.startswith(tuple(heads)))
    classes = _classes(heads, state)
    if report.filled:
        report = replace(report, head=_head_remark(fresh, heads, classes, wanted, state))
    return _Fit(state, report, ready, classes)


def _resized(model: nn.Module, name: str, tensor: Tensor, shape: torch.Size, *, is_first: bool) -> Tensor | None:
    """Return a tensor resized to the model's shape, or None if that is not possible."""
    if tensor.is_meta:  # only the shape is needed, and interpolation is a thousand times slower on the meta device than on real tensors
        tensor = torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
    if is_first and tensor.ndim == len(shape) and tensor.shape[:1] + tensor.shape[2:] == shape[:1] + shape[2:]:
        return adapt_channels(tensor, shape[1])
    fitted = None
    with contextlib.suppress(ValueError):  # a hook may reject a size
        fitted = model.resize_tensor(name, tensor, shape) if hasattr(model, "resize_tensor") else None  # type: ignore[operator]
    return fitted if fitted is not None and fitted.shape == shape else None


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapt a first convolution's weight (out, I, ...) to images of other channels, (out, channels, ...).

    One channel: the sum over the channels, so that a grey image gives the output of its RGB copy. More: repeated and scaled by
    I / channels, which keeps the scale of the outputs. The rule is timm's.
    """
    if channels == 1:
        return weight.sum(1, keepdim=True)
    count = weight.shape[1]
    repeats = -(-channels // count)
    return weight.repeat(1, repeats, *[1] * (weight.ndim - 2))[:, :channels] * (count / channels)


def _first_convolution(model: nn.Module) -> str:
    """Return the name of the weight of the image's first convolution, "" if the model does not begin with a convolution."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    first = next(((name, part) for name, part in model.named_modules() if isinstance(part, kinds)), None)
    return f"{first[0]}.weight" if first and first[1].groups == 1 else ""


# ---- the head


def _heads(model: nn.Module) -> list[str]:
    """Return the prefixes of the classifier's tensors, such as "head." (two for a distilled model)."""
    if not hasattr(model, "get_classifier"):
        return []
    found = model.get_classifier()  # type: ignore[operator]
    parts = found if isinstance(found, tuple | list) else (found,)
    return [f"{name}." for name, part in model.named_modules() if name and any(part is p for p in parts)]


def _fresh_heads(heads: list[str], wanted: Mapping[str, Tensor], state: State) -> set[str]:
    """Return the model's head tensors that the file does not fill: it lacks the head or has one for other classes."""
    fresh: set[str] = set()
    for prefix in heads:
        names = [n for n in wanted if n.startswith(prefix)]
        absent = not any(n in state for n in names)
        other = any(n in state and state[n].shape != wanted[n].shape and state[n].shape[1:] == wanted[n].shape[1:] for n in names)
        if absent or other:
            fresh.update(names)
    return fresh


def _classes(heads: list[str], state: State) -> int | None:
    if not heads:
        return None
    sizes = [t.shape[0] for n, t in state.items() if n.startswith(tuple(heads)) and n.endswith("weight") and t.ndim >= 2]
    return sizes[0] if sizes else 0


def _with_1k_head(model: nn.Module, fit: _Fit) -> _Fit:
    """Return a fit whose head of ImageNet-22K is reduced to ImageNet-1K, if the model's head has the number of classes of the latter."""
    wanted, heads = model.state_dict(), tuple(_heads(model))
    sizes = {name: (tensor.shape[:1], wanted[name].shape[:1]) for name, tensor in fit.state.items() if name in wanted}
    names = [name for name, size in sizes.items() if name.startswith(heads) and size == ((CLASSES_22K,), (CLASSES_1K,))] if heads else []
    if not names:
        return fit
    order = getattr(model, "imagenet_22k", BY_NAME)
    found = _fit(model, fit.state | {name: head_of_1k(fit.state[name], order) for name in names}, fit.report)
    remark = f"its {CLASSES_1K:,} classes were taken as those of ImageNet-1K and chosen among the file's {CLASSES_22K:,} of ImageNet-22K"
    return replace(found, report=replace(found.report, head=remark), tune=[] if order == BY_NAME else names)


def _head_remark(fresh: set[str], heads: list[str], classes: int | None, wanted: Mapping[str, Tensor], state: State) -> str:
    if fresh:
        mine = next((wanted[n].shape[0] for n in sorted(fresh) if n.endswith("weight")), 0)
        theirs = f"the file's has {classes} classes" if classes else "the file has none"
        return f"left as it was, for {mine} classes; {theirs}"
    dropped = heads and any(n.startswith(tuple(heads)) and n not in wanted for n in state)
    return f"the file's, of {classes} classes, was dropped; the model has none" if dropped else ""


# ---- models that the file fits


def models_that_fit(weights: Weights, *, near: str = "") -> list[str]:
    """Return the names of our models that the file fills completely, the best fits only.

    Models are built without memory (on the meta device) and compared by names and shapes.

    Args:
        near: a model's name; its own family is tried first, and the others only if none of it fits.
    """
    every = families()
    own = sorted((f for f in every if near.startswith(f.name + "_")), key=lambda f: len(f.name))[-1:]  # "swin_mlp", not "swin"
    for group in (own, [f for f in every if f not in own]):
        found = [pair for f in group for pair in _fitting_variants(f, weights, whole=group is own)]
        if found:
            most = max(quality for quality, _ in found)
            return [name for quality, name in found if quality == most]
    return []


def _fitting_variants(f: Family, weights: Weights, *, whole: bool) -> Iterator[tuple[tuple[int, int, int], str]]:
    """Yield quality and name of the variants that the file fills; unless `whole`, only if the first variant's names resemble the file's."""
    shapes = replace(weights, forms=[{name: tensor.to("meta") for name, tensor in form.items()} for form in weights.forms])
    readings = [state for _, state in _readings(f.dialects, shapes)]
    for i, (variant, name) in enumerate(zip(f.variants, f.model_names(), strict=True)):
        try:
            with torch.device("meta"):
                model = f.cls(**f.arguments(variant))
        except (TypeError, ValueError, RuntimeError):  # a model that cannot be built is not suggested, and must not hide the report
            continue
        fits = [_fit(model, state, LoadReport("")) for state in readings]
        if good := [fit.quality() for fit in fits if fit.report.complete and fit.report.filled]:
            yield max(good), name
        if i == 0 and not whole:  # a reading with less than half of the smallest variant's names is of another architecture
            readings = [fit.state for fit in fits if fit.report.known >= len(fit.report.missing)]
            if not readings:
                return
