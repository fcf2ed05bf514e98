"""Applying of methods to a model, in a fixed order and atomically, and undoing them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.catalog.calling import Inputs, arguments, example_inputs
from vitarium.catalog.methods import KINDS, AttachReport, Method, build_method, find_method, list_methods, parse_method
from vitarium.catalog.probe import bytes_of, macs_of
from vitarium.errors import AttachError, UnsupportedModel, UsageError


def apply(
    model: nn.Module,
    *methods: Method | str,
    example: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    keep_original: bool = True,
    quiet: bool = False,
) -> nn.Module:
    """Apply methods to a model, in place. If one fails, none is applied.

    Args:
        model: any nn.Module; some methods require a plain vision transformer.
        methods: instances, or text such as "pitome:keep=0.925", in the order prune, reduce, adapt, quantize, explain.
        example: inputs of a call, in order or by name, to count multiply-accumulates; by default `example_inputs` of the model.
        keep_original: whether to keep replaced weights, so that `undo` works; False frees their memory.
        quiet: do not print the reports.

    Returns:
        the same model, with a report for each method at the end of `model.methods`.

    Raises:
        UsageError: wrong order, a method twice, text that is not a method.
        AttachError, UnsupportedModel: a method does not support this model; the model is unchanged.
    """
    parsed = [parse_method(m) if isinstance(m, str) else m for m in methods]
    done = methods_on(model)
    _check_order([report.method for report in done], parsed)
    inputs = _inputs(model, example)
    applied: list[AttachReport] = []
    try:
        for one in parsed:
            _check_refusal(model, one)
            before = _cost(model, inputs, applied)
            report = _checked(model, one.attach(model))
            applied.append(report)
            report.macs_before, report.bytes_before = before
            report.macs_after, report.bytes_after = _cost(model, inputs)
    except BaseException as error:
        for report in reversed(applied):
            _restore(model, report)
        if isinstance(error, AttachError | UnsupportedModel):
            raise type(error)(f"{error}{_others(model)}") from error
        raise
    if not keep_original:
        for report in applied:
            _forget(report)
    model.methods = [*done, *applied]  # type: ignore[assignment]
    if not quiet:
        for report in applied:
            print(report)
    return model


def fitting_methods(model: nn.Module) -> dict[str, str]:
    """Return every method with the reason why a model does not take it; "" where it fits. The model is unchanged.

    Methods are tried with their default options; others may fit where these do not (`sparse_prune` fits every model, its
    structure=heads only plain vision transformers).
    """
    found: dict[str, str] = {}
    for slug in list_methods():
        one = find_method(slug)()
        try:
            _check_refusal(model, one)
            one.check_fits(model)
            found[slug] = ""
        except (AttachError, UnsupportedModel) as error:
            found[slug] = str(error)
    return found


def _others(model: nn.Module) -> str:
    """Return the end of the message of a refusal, with the methods that fit the model; "" if none does."""
    fit = [slug for slug, reason in fitting_methods(model).items() if not reason]
    return f"; methods that fit this {type(model).__name__}: {', '.join(fit)} ('vitarium methods' describes them)" if fit else ""


def _check_refusal(model: nn.Module, one: Method) -> None:
    """Raise AttachError for a kind of method, or a method, that a model's `refuses` lists with the reason."""
    listed = getattr(model, "refuses", {})
    if reason := listed.get(one.slug) or listed.get(one.kind):
        raise AttachError(f"a {type(model).__name__} does not take {one.slug}: {reason}")


def undo(model: nn.Module) -> nn.Module:
    """Undo every method, in reverse order; modules and values are restored bit by bit. Returns the same model.

    Raises:
        UsageError: the original values are gone (applied with keep_original=False, or loaded from a file that does not hold them).
    """
    reports = methods_on(model)
    if gone := [report for report in reports if not report.can_undo]:
        raise UsageError(f"{gone[0].method.slug} cannot be undone: the original weights are gone; load or create the original model again")
    for report in reversed(reports):
        _restore(model, report)
    if reports:
        model.methods = []  # type: ignore[assignment]
    return model


def methods_on(model: nn.Module) -> list[AttachReport]:
    """Return the reports of the methods on a model, in the order in which they were applied."""
    return list(getattr(model, "methods", ()))


def rebuild_methods(model: nn.Module, saved: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Rebuild on a new model the methods that a file lists (`AttachReport.saved`); its weights are loaded afterwards.

    Raises:
        UsageError: unknown method or option, or a model that they do not support.
    """
    methods = [build_method(row["slug"], row.get("options", {})) for row in saved]
    _check_order([], methods)
    reports = []
    for one, row in zip(methods, saved, strict=True):
        report = _checked(model, one.rebuild(model, row.get("state", {})))
        report.bytes_before = report.bytes_after = bytes_of(model)
        if not one.keeps_weights:
            _forget(report)
        reports.append(report)
    if reports:
        model.methods = reports  # type: ignore[assignment]
    return model


def _check_order(done: Sequence[Method], new: Sequence[Method]) -> None:
    everything = [*done, *new]
    for earlier, later in itertools.pairwise(everything):
        if KINDS.index(earlier.kind) > KINDS.index(later.kind):
            hint = "undo the model and apply both in that order" if earlier in done else "give them in that order"
            pair = f"{later.slug} ({later.kind}) comes after {earlier.slug} ({earlier.kind})"
            raise UsageError(f"{pair}, but methods apply in the order {', '.join(KINDS)}; {hint}")
    slugs = [m.slug for m in everything]
    if twice := [slug for slug in slugs if slugs.count(slug) > 1]:
        raise UsageError(f"{twice[0]} would be on the model twice; undo it first, or tune it: model.methods[i].tune(...)")
    reducers = [m.slug for m in everything if m.kind == "reduce"]
    if len(reducers) > 1:
        raise UsageError(f"a model accepts one token reduction, got {' and '.join(reducers)}; undo the first one")


def _checked(model: nn.Module, report: AttachReport) -> AttachReport:
    if not report.sites:
        _restore(model, report)
        raise AttachError(f"{report.method.slug} found no module to change in a {type(model).__name__}; the model is unchanged")
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
    for name in report.added:
        parent, _, leaf = name.rpartition(".")
        delattr(model.get_submodule(parent), leaf)
    for name in report.frozen:
        model.get_parameter(name).requires_grad_(True)


def _forget(report: AttachReport) -> None:
    if not report.method.keeps_weights:
        report.replaced, report.tensors, report.can_undo = {}, {}, False


def _inputs(model: nn.Module, example: Tensor | Sequence[Any] | Mapping[str, Any] | None) -> Inputs | tuple[Any, ...] | None:
    """Return the inputs of a call; None if no example is given and the model's input is unknown."""
    if example is None:
        try:
            return example_inputs(model)
        except UsageError:
            return None
    if isinstance(example, Mapping):
        arguments(model, example)  # raises for an unknown input name
        return dict(example)
    return (example,) if isinstance(example, Tensor) else tuple(example)


def cost_of(model: nn.Module) -> tuple[int | None, int]:
    """Return the multiply-accumulates of one example (None if the model's input is unknown) and the bytes of weights."""
    return _cost(model, _inputs(model, None))


def _cost(model: nn.Module, inputs: Inputs | tuple[Any, ...] | None, earlier: Sequence[AttachReport] = ()) -> tuple[int | None, int]:
    if earlier:
        return earlier[-1].macs_after, earlier[-1].bytes_after
    if inputs is None:
        return None, bytes_of(model)
    return macs_of(model, *((inputs,) if isinstance(inputs, dict) else inputs)), bytes_of(model)
