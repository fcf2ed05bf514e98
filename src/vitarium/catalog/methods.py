"""Methods: changes to an existing model that are reported, can be undone, and are saved with the model.

    vitarium.apply(model, PiToMe(keep=0.925), "mptq:bits=6")
    model.methods[0].tune(keep=0.95)          # live options
    vitarium.undo(model)

A method is a class under `@method` and `@validated` (catalog/options.py); its fields are its options, checked on construction and saved
with the model. It changes one model object in ways that `undo` reverts: it replaces modules (`AttachReport.replaced`), adds some (`added`),
overwrites parameters and buffers (`tensors`), or freezes parameters (`frozen`). No class is patched.

Kinds apply in the order prune, reduce, adapt, quantize, explain: a later kind may build on the result of an earlier one.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn

from vitarium.assignments import parse_call
from vitarium.catalog.classes import Classes
from vitarium.catalog.options import check_names
from vitarium.errors import AttachError, UsageError

Kind = Literal["prune", "reduce", "adapt", "quantize", "explain"]
KINDS: tuple[Kind, ...] = ("prune", "reduce", "adapt", "quantize", "explain")
MethodClass = TypeVar("MethodClass", bound="type[Method]")


@dataclass
class AttachReport:
    """Changes that a method made to a model. `attach` fills in the first group of fields; `apply` measures the second.

    Args:
        method: the method with its current options.
        replaced: name -> original module, which `undo` restores.
        tensors: name of a parameter or buffer -> its original values, if they were overwritten in place.
        added: names of new modules, which `undo` removes.
        frozen: names of parameters that were frozen, which `undo` unfreezes.
        sites: names of the modules that the method changes.
        parameters_added: number of new parameters, such as those of adapters.
        live: objects with an attribute `method` whose options they read at every pass; `tune` updates them.
        state: plain values found while attaching (bits per layer, widths); saved, and passed to `rebuild`.
        macs_before, macs_after: multiply-accumulates of one image; None if the model's input size is not known.
        bytes_before, bytes_after: memory of parameters and buffers.
        can_undo: whether the original values are still available.
    """

    method: Method
    replaced: dict[str, nn.Module] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
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
            parts.append(f"{self.macs_before / 1e9:.3g} -> {self.macs_after / 1e9:.3g} GMACs")
        parts.append(f"{self.bytes_before / 1e6:.3g} -> {self.bytes_after / 1e6:.3g} MB of weights")
        return f"{self.method}: {', '.join(parts)}"

    def tune(self, **options: Any) -> None:
        """Change options of the method while it is attached, from the next pass on.

        Raises:
            UsageError: an option that is not live, or a value out of range; nothing is changed.
        """
        if wrong := [name for name in options if name not in self.method.tunable]:
            can = ", ".join(self.method.tunable) or "none"
            raise UsageError(
                f"{self.method.slug} cannot change {wrong[0]!r} while attached (live options: {can}); undo it and apply it again"
            )
        self.method = dataclasses.replace(self.method, **options)
        for site in self.live:
            site.method = self.method

    def saved(self) -> dict[str, Any]:
        """Return the saved form: {"slug", "options"}, and "state" if there is one."""
        return {"slug": self.method.slug, "options": self.method.options()} | ({"state": self.state} if self.state else {})


@dataclass(frozen=True)
class Method:
    """Base of all methods: fields are options, `attach` changes a model.

    A field whose value cannot be saved (a loader of calibration images) is declared with `field(metadata={"saved": False})`.
    """

    slug: ClassVar[str]
    kind: ClassVar[Kind]
    tunable: ClassVar[tuple[str, ...]] = ()
    """Options that can change while the method is attached."""
    training: ClassVar[Literal["none", "images", "required"]] = "none"
    """Requirements beside a trained model: nothing, images for calibration, or training afterwards."""
    keeps_weights: ClassVar[bool] = True
    """True if the model keeps the original weights, so that a loaded file can be undone. False for quantizers and pruners."""

    def attach(self, model: nn.Module) -> AttachReport:
        """Change the model, or raise and leave it unchanged.

        Raises:
            AttachError: no module to change, or the changed model failed its check.
            UnsupportedModel: the model's structure is not supported.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define attach")

    def check_fits(self, model: nn.Module) -> None:
        """Raise what `attach` would raise for this model; the model is unchanged, and nothing is calibrated or computed.

        By default the method is attached to a copy without values, on the meta device.

        Raises:
            AttachError, UnsupportedModel: see `attach`.
        """
        if not self.attach(without_values(model)).sites:
            raise AttachError(f"{self.slug} found no module to change in a {type(model).__name__}")

    def rebuild(self, model: nn.Module, state: Mapping[str, Any]) -> AttachReport:
        """Rebuild on a new model the structure that `attach` creates, from saved options and `state`; weights are loaded afterwards.

        May run on the meta device. By default it attaches.
        """
        return self.attach(model)

    def options(self) -> dict[str, Any]:
        """Return the options as plain values, defaults included."""
        fields = [f for f in dataclasses.fields(self) if f.metadata.get("saved", True)]
        return {f.name: _plain(getattr(self, f.name)) for f in fields}

    def __str__(self) -> str:
        """Return the text that `parse_method` parses: "pitome:keep=0.9"; options at their defaults are left out."""
        return call_text(self.slug, self.options(), defaults_of(type(self)))


def without_values(model: nn.Module) -> nn.Module:
    """Return a copy of a model with its parameters and buffers on the meta device, which takes no memory."""
    tensors = [*model.parameters(), *model.buffers()]
    shapes: dict[int, Any] = {
        id(t): nn.Parameter(t.detach().to("meta"), t.requires_grad) if isinstance(t, nn.Parameter) else t.to("meta") for t in tensors
    }
    return copy.deepcopy(model, shapes)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def defaults_of(cls: type[Method]) -> dict[str, Any]:
    """Return the defaults of a method's options as plain values; options without one are left out."""
    found = {
        f.name: f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        for f in dataclasses.fields(cls)
        if f.metadata.get("saved", True)
    }
    return {name: _plain(value) for name, value in found.items() if value is not dataclasses.MISSING}


def call_text(slug: str, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> str:
    """Return a method as `parse_method` parses it: "pitome:keep=0.9"; options at their defaults are left out.

    Args:
        slug: of the method.
        options: plain values, such as those of a file's record.
        defaults: of the options; None: those of the method's class, or none if the method is not known here.
    """
    if defaults is None:
        try:
            defaults = defaults_of(find_method(slug))
        except UsageError:  # a method of the user's own code
            defaults = {}
    given = [f"{name}={option_text(value)}" for name, value in options.items() if name not in defaults or defaults[name] != value]
    return slug + (":" + ",".join(given) if given else "")


def option_text(value: Any) -> str:
    """Return a plain value as an option is written on the command line: [3,6,9], true, 0.9."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(option_text, value))}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- the registry

METHODS: Classes[Method] = Classes("methods", "method")


def method(slug: str, *, kind: Kind) -> Callable[[MethodClass], MethodClass]:
    """Register a method under the slug of its system, or under another name (a baseline inside another system's file)."""

    def prepare(cls: type[Method]) -> None:
        cls.slug, cls.kind = slug, kind

    return METHODS.register(slug, prepare)


def find_method(slug: str) -> type[Method]:
    """Return the class of a method. Imports only its file.

    Raises:
        UsageError: unknown method; the message names similar ones.
    """
    return METHODS.find(slug)


def list_methods() -> list[str]:
    """Return the slugs of all methods. Imports none of them."""
    return METHODS.names()


def build_method(slug: str, options: Mapping[str, Any]) -> Method:
    """Return a method from its slug and options; lists become tuples.

    Raises:
        UsageError: unknown slug or option, or a value out of range.
    """
    cls = find_method(slug)
    check_names(slug, options, [f.name for f in dataclasses.fields(cls)])
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in options.items()})
    except TypeError as error:
        raise UsageError(f"{slug} does not accept these options: {error}") from error


def parse_method(text: str) -> Method:
    """Return a method from its text on the command line: "pitome", "pitome:keep=0.925", "evit:keep=0.7,blocks=[3,6,9]".

    Raises:
        UsageError: the text has another form, or `build_method` raises for it.
    """
    slug, options = parse_call(text)
    return build_method(slug, options)
