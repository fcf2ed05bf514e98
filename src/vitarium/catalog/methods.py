"""What changes a model that exists: methods, applied in a fixed order, reported, undone, remembered by a saved file.

    vitarium.apply(model, PiToMe(keep=0.925), "mptq:bits=6")
    model.methods[0].tune(keep=0.95)          # knobs that can be live, are
    vitarium.undo(model)

A method is a frozen dataclass under `@method`; its fields are its options, checked in `__post_init__` and saved with the model. It changes
this one model object and nothing else, in one of two ways that `undo` knows how to take back: it exchanges modules
(`AttachReport.replaced`), or it overwrites parameters and buffers (`AttachReport.tensors`). No class is patched.

Kinds apply in the order prune, reduce, adapt, quantize, explain: a later kind may build on what an earlier one left, never the reverse.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
import yaml
from torch import Tensor, nn

from vitarium.catalog.probe import bytes_of, example_input, macs_of
from vitarium.catalog.registry import import_system, system_module
from vitarium.catalog.systems import systems
from vitarium.errors import AttachError, UsageError, nearest

Kind = Literal["prune", "reduce", "adapt", "quantize", "explain"]
KINDS: tuple[Kind, ...] = ("prune", "reduce", "adapt", "quantize", "explain")
MethodClass = TypeVar("MethodClass", bound="type[Method]")

BASELINES = {"tome": "pitome"}
"""Methods that are no system of their own -> the system in whose file they are."""


@dataclass
class AttachReport:
    """What a method did to a model. `attach` fills in the first group; `apply` measures the second.

    Args:
        method: with its options as they are now.
        replaced: name of a module -> the module that was there before; what `undo` puts back.
        tensors: name of a parameter or buffer -> its values before, where they were overwritten in place.
        sites: names of the places inside the model that the method works at.
        parameters_added: by the method itself, such as adapters.
        live: objects with an attribute `method` that read their options at every pass; `tune` reaches them.
        state: plain values that were found while attaching (bits a layer, widths); saved, and given to `rebuild`.
        macs_before, macs_after: multiply-accumulates of one image, None where the model does not say what input it takes.
        bytes_before, bytes_after: parameters and buffers in memory.
        can_undo: whether the values of before are still there.
    """

    method: Method
    replaced: dict[str, nn.Module] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sites: tuple[str, ...] = ()
    parameters_added: int = 0
    live: list[Any] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)

    macs_before: int | None = None
    macs_after: int | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    can_undo: bool = True

    def __str__(self) -> str:
        parts = [f"{len(self.sites)} sites"]
        if self.replaced:
            parts.append(f"{len(self.replaced)} modules replaced")
        if self.parameters_added:
            parts.append(f"{self.parameters_added:,} parameters added")
        if self.macs_before and self.macs_after is not None:
            parts.append(f"{self.macs_before / 1e6:,.4g} -> {self.macs_after / 1e6:,.4g} million MACs")
        parts.append(f"{self.bytes_before / 1e6:,.4g} -> {self.bytes_after / 1e6:,.4g} MB of weights")
        return f"{self.method}: {', '.join(parts)}"

    def tune(self, **options: Any) -> None:
        """Change options of the method while it stays attached, from the next pass on.

        Raises:
            UsageError: an option that is not live, or out of range; nothing is changed.
        """
        if wrong := [name for name in options if name not in self.method.tunable]:
            can = ", ".join(self.method.tunable) or "none"
            raise UsageError(f"{self.method.slug} cannot change {wrong[0]!r} while attached (it can: {can}); undo it and apply it anew")
        self.method = dataclasses.replace(self.method, **options)
        for site in self.live:
            site.method = self.method

    def saved(self) -> dict[str, Any]:
        """For the file: {"slug", "options"}, and "state" where there is one."""
        return {"slug": self.method.slug, "options": self.method.options()} | ({"state": self.state} if self.state else {})


@dataclass(frozen=True)
class Method:
    """Base of all methods: options as fields, `attach` as the work.

    A field whose value no file can hold (a loader of calibration images) is declared with `field(metadata={"saved": False})`.
    """

    slug: ClassVar[str]
    kind: ClassVar[Kind]
    tunable: ClassVar[tuple[str, ...]] = ()
    """Options that may change while the method is attached."""
    keeps_weights: ClassVar[bool] = True
    """Whether the weights of before are still in the model, so that a loaded file can be undone too. False for quantizers and pruners."""

    def attach(self, model: nn.Module) -> AttachReport:
        """Change the model, or raise and leave it as it was.

        Raises:
            AttachError: nothing to work at, or the changed model could not be proven.
            UnsupportedModel: the model's inside is not known.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define attach")

    def rebuild(self, model: nn.Module, state: Mapping[str, Any]) -> AttachReport:
        """Give a fresh model the structure that `attach` gave it once, from saved options and `state`; weights are filled in afterwards.

        May run on the meta device. By default it attaches.
        """
        return self.attach(model)

    def options(self) -> dict[str, Any]:
        """The options as plain values, those at their defaults too."""
        fields = [f for f in dataclasses.fields(self) if f.metadata.get("saved", True)]
        return {f.name: _plain(getattr(self, f.name)) for f in fields}

    def __str__(self) -> str:
        """As `parse_method` reads it: "pitome:keep=0.9"; options at their defaults are left out."""
        given = [
            f"{f.name}={_text(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if f.metadata.get("saved", True) and getattr(self, f.name) != f.default
        ]
        return self.slug + (":" + ",".join(given) if given else "")


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    return f"[{','.join(map(_text, value))}]" if isinstance(value, list | tuple) else {True: "true", False: "false"}.get(value, str(value))


# ---- the registry

_METHODS: dict[str, type[Method]] = {}


def method(slug: str, *, kind: Kind) -> Callable[[MethodClass], MethodClass]:
    """Register a method under the slug of its system (or, for a baseline inside another system's file, a row of `BASELINES`)."""

    def register(cls: MethodClass) -> MethodClass:
        cls.slug, cls.kind = slug, kind
        _METHODS[slug] = cls
        return cls

    return register


def find_method(slug: str) -> type[Method]:
    """The class of a method. Imports only the file that the slug points to.

    Raises:
        UsageError: there is none; the message names near ones.
    """
    home = BASELINES.get(slug, slug)
    if any(s.slug == home for s in systems()):
        import_system(home)
    if slug not in _METHODS:
        known = list_methods()
        raise UsageError(f"unknown method {slug!r}{nearest(slug, known)} (methods: {', '.join(known)})")
    return _METHODS[slug]


def list_methods() -> list[str]:
    """Slugs of all methods."""
    for system in systems():
        if not system.room.startswith("backbones"):
            import_system(system.slug)
    return sorted(_METHODS)


def methods_of_system(slug: str) -> list[str]:
    """The methods that a system's file registers."""
    module = system_module(slug)
    if module is None:
        return []
    importlib.import_module(module)
    return sorted(name for name, cls in _METHODS.items() if cls.__module__ == module)


def build_method(slug: str, options: Mapping[str, Any]) -> Method:
    """A method from its slug and options.

    Raises:
        UsageError: unknown slug or option, or a value out of range.
    """
    cls = find_method(slug)
    known = [f.name for f in dataclasses.fields(cls)]
    if wrong := [name for name in options if name not in known]:
        raise UsageError(f"{slug} has no option {wrong[0]!r}{nearest(wrong[0], known)} (it has {', '.join(known) or 'none'})")
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in options.items()})
    except TypeError as error:
        raise UsageError(f"{slug} refuses these options: {error}") from error


def parse_method(text: str) -> Method:
    """A method from the command line's way of writing it: "pitome", "pitome:keep=0.925", "evit:keep=0.7,blocks=[3,6,9]".

    Values are read as YAML. Raises UsageError where the text is none of this.
    """
    slug, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in _split(rest):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"cannot read {part!r} in {text!r}: options are written NAME=VALUE, with commas between, after METHOD:")
        try:
            options[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"cannot read the value of {name!r} in {text!r}: {value!r}") from error
    return build_method(slug.strip(), options)


def _split(text: str) -> list[str]:
    """Parts between the commas that are outside of brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part for part in parts if part.strip()]


# ---- the two verbs


def apply(
    model: nn.Module, *methods: Method | str, example: Tensor | Sequence[Any] | None = None, keep_original: bool = True, quiet: bool = False
) -> nn.Module:
    """Apply methods to a model, in place. All of them are applied, or none.

    Args:
        model: any nn.Module; some methods ask for a plain vision transformer.
        methods: instances, or text such as "pitome:keep=0.925", in the order prune, reduce, adapt, quantize, explain.
        example: what the model is called with, to count multiply-accumulates; by default an image, where the model says of what size.
        keep_original: whether to hold on to replaced weights, so that `undo` works; False frees their memory.
        quiet: do not print the reports.

    Returns:
        the same model, with a report for each method at the end of `model.methods`.

    Raises:
        UsageError: wrong order, a method twice, unknown text.
        AttachError, UnsupportedModel: a method cannot work on this model; the model is unchanged.
    """
    parsed = [parse_method(m) if isinstance(m, str) else m for m in methods]
    done = methods_on(model)
    _check_order([report.method for report in done], parsed)
    inputs = _inputs(model, example)
    applied: list[AttachReport] = []
    try:
        for one in parsed:
            before = _cost(model, inputs, applied)
            report = _attach(model, one, one.attach)
            applied.append(report)
            report.macs_before, report.bytes_before = before
            report.macs_after, report.bytes_after = _cost(model, inputs)
    except BaseException:
        for report in reversed(applied):
            _restore(model, report)
        raise
    if not keep_original:
        for report in applied:
            _forget(report)
    model.methods = [*done, *applied]  # type: ignore[assignment]
    if not quiet:
        for report in applied:
            print(report)
    return model


def undo(model: nn.Module) -> nn.Module:
    """Take back every method, last one first: modules and values are those of before, bit by bit. Returns the same model.

    Raises:
        UsageError: the values of before are gone (applied with keep_original=False, or loaded from a file that does not hold them).
    """
    reports = methods_on(model)
    if gone := [report for report in reports if not report.can_undo]:
        raise UsageError(f"{gone[0].method.slug} cannot be undone: the weights of before are gone; load or create the original model again")
    for report in reversed(reports):
        _restore(model, report)
    if reports:
        model.methods = []  # type: ignore[assignment]
    return model


def methods_on(model: nn.Module) -> list[AttachReport]:
    """The reports of the methods on a model, in the order in which they were applied."""
    return list(getattr(model, "methods", ()))


def rebuild_methods(model: nn.Module, saved: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Give a fresh model the methods that a file lists (`AttachReport.saved`); its weights are filled in afterwards.

    Raises:
        UsageError: unknown method or option, or the model does not fit it.
    """
    methods = [build_method(row["slug"], row.get("options", {})) for row in saved]
    _check_order([], methods)
    reports = []
    for one, row in zip(methods, saved, strict=True):
        report = _attach(model, one, lambda m, one=one, row=row: one.rebuild(m, row.get("state", {})))
        report.bytes_before = report.bytes_after = bytes_of(model)
        if not one.keeps_weights:
            _forget(report)
        reports.append(report)
    if reports:
        model.methods = reports  # type: ignore[assignment]
    return model


def _check_order(done: Sequence[Method], new: Sequence[Method]) -> None:
    everything = [*done, *new]
    for earlier, later in zip(everything, everything[1:], strict=False):
        if KINDS.index(earlier.kind) > KINDS.index(later.kind):
            hint = "undo the model and apply both in that order" if later in new and earlier in done else "give them in that order"
            raise UsageError(
                f"{later.slug} ({later.kind}) comes after {earlier.slug} ({earlier.kind}), but methods apply in the order {', '.join(KINDS)}; {hint}"
            )
    slugs = [m.slug for m in everything]
    if twice := [slug for slug in slugs if slugs.count(slug) > 1]:
        raise UsageError(f"{twice[0]} would be on the model twice; undo it first, or tune it: model.methods[i].tune(...)")
    reducers = [m.slug for m in everything if m.kind == "reduce"]
    if len(reducers) > 1:
        raise UsageError(f"a model takes one token reduction, got {' and '.join(reducers)}; undo the first one")


def _attach(model: nn.Module, one: Method, how: Callable[[nn.Module], AttachReport]) -> AttachReport:
    report = how(model)
    if not report.sites:
        _restore(model, report)
        raise AttachError(f"{one.slug} found nothing to work at in a {type(model).__name__}; the model is unchanged")
    return report


def _restore(model: nn.Module, report: AttachReport) -> None:
    for name, original in report.replaced.items():
        now = model.get_submodule(name)
        weight = next(now.parameters(), None)
        model.set_submodule(name, original if weight is None else original.to(weight.device))
        original.training = now.training
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, values in report.tensors.items():
            own[name].data = values.to(own[name].device)


def _forget(report: AttachReport) -> None:
    if not report.method.keeps_weights:
        report.replaced, report.tensors, report.can_undo = {}, {}, False


def _inputs(model: nn.Module, example: Tensor | Sequence[Any] | None) -> tuple[Any, ...] | None:
    if example is None:
        image = example_input(model)
        return None if image is None else (image,)
    return (example,) if isinstance(example, Tensor) else tuple(example)


def _cost(model: nn.Module, inputs: tuple[Any, ...] | None, earlier: Sequence[AttachReport] = ()) -> tuple[int | None, int]:
    if earlier:
        return earlier[-1].macs_after, earlier[-1].bytes_after
    return (None if inputs is None else macs_of(model, *inputs)), bytes_of(model)
