"""Describe a model by name, or a file of weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitarium.catalog.index import at_size, read_index
from vitarium.catalog.search import list_models, unknown_model
from vitarium.catalog.systems import find_system
from vitarium.files import is_model_file
from vitarium.numbers import short
from vitarium.pages.tables import TableData
from vitarium.texts import first_paragraph
from vitarium.verbs.result import Result

if TYPE_CHECKING:
    from vitarium.catalog.index import Cost, Entry, IndexedFamily, Variant


@dataclass(repr=False)
class Info(Result):
    """A model or a file of weights.

    Attributes:
        model: name or file, as it was given.
        report: of a model: its arguments, variants, cost, stages, preprocessing and known weights. Of a file: its size and tensors, and in
            "model" the record of `vitarium.save`; None there: the file has no record, and "fits" names the models that it fits.
        unknown: quantities of the cost that are neither in the index nor measured.
    """

    model: str
    report: dict[str, Any]
    unknown: tuple[str, ...] = ()

    @property
    def is_file(self) -> bool:
        """Return whether this is a file of weights."""
        return "file" in self.report

    def facts(self) -> dict[str, Any]:
        if self.is_file:
            return file_facts(self.report)
        own = model_facts(self.report, self.unknown)
        return {"model": self.report["name"], **own, **(family_facts(self.report) if "system" in self.report else {})}

    def tables(self) -> list[TableData]:
        if self.is_file:
            rows = [[name, " x ".join(map(str, shape)) or "scalar"] for name, shape in self.report.get("first_tensors", {}).items()]
            return [TableData("The first tensors", ["tensor", "shape"], rows)] if rows else []
        stages = [[stage["module"], str(stage["channels"]), f"{stage['stride']} px"] for stage in self.report["stages"]]
        arguments = [[row["name"], value_text(row["value"]), row["help"]] for row in self.report.get("arguments", [])]
        return [
            *([TableData("Stages", ["map", ">channels", ">stride"], stages)] if stages else []),
            *([TableData("Arguments", ["argument", "~value", "~meaning"], arguments)] if arguments else []),
        ]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.report)


def info(model: str | os.PathLike[str], *, image_size: int | None = None, measure: bool = False) -> Info:
    """Describe a model by name: its arguments, variants, cost, stages, preprocessing and known weights; of a file, what it holds.

    Args:
        model: a model's name, or a file that `vitarium.save` wrote.
        image_size: side of the image for the cost, pixels; None: the model's own. Of a name.
        measure: build the model without weights and count; the default is to read the index, without PyTorch. Of a name.

    Raises:
        UsageError: unknown model, or it cannot be built for this size.
        CheckpointError: a file that is missing, damaged or unsafe.
    """
    text = os.fspath(model)
    if is_model_file(text):
        return Info(text, describe_file(text))
    report = describe(text, image_size, measure=measure)
    return Info(text, {key: value for key, value in report.items() if key != "unknown"}, tuple(report["unknown"]))


def describe(name: str, image_size: int | None = None, *, measure: bool = False) -> dict[str, Any]:
    """Return the values of a model by name: those of `Info.report`, and the costs that are not known, in "unknown".

    Args:
        name: of a model of the library, or of another's ("timm/NAME", "hf/OWNER/NAME").
        image_size: side of the image for the cost, pixels; None: the model's own.
        measure: build the model and count; models that the index does not hold are always built.

    Raises:
        UsageError: unknown model, or it cannot be built for this size.
    """
    bare = name if "/" in name else name.partition(".")[0]
    found = read_index().models.get(bare)
    if found is None:
        if "/" not in bare and bare not in list_models():
            raise unknown_model(bare)
        return _described_by_building(bare, image_size)
    family, variant = found
    if measure:
        from vitarium.verbs.measuring import measure_cost

        cost = measure_cost(bare, image_size, memory=True)
    else:
        cost = variant.cost(image_size)
    entry = next(e for e in read_index().entries.values() if family.name in e.families)
    preprocessing = at_size(variant.preprocessing, cost.image_size, family.crop_pct) if image_size else dict(variant.preprocessing)
    return {
        "name": bare,
        "summary": entry.summary,
        **_cost(cost),
        "num_classes": variant.num_classes,
        "stages": [{"module": module, "channels": channels, "stride": stride} for module, channels, stride in variant.stages],
        "preprocessing": preprocessing,
        **_of_family(family, variant, entry),
    }


def _cost(cost: Cost) -> dict[str, Any]:
    memory = None if cost.peak_memory is None else cost.peak_memory / 1e6
    values = {"params": cost.params, "bytes": cost.bytes, "macs": cost.macs, "peak_memory_mb": memory, "image_size": cost.image_size}
    return {**values, "unknown": sorted(cost.unknown)}


def _of_family(family: IndexedFamily, variant: Variant, entry: Entry) -> dict[str, Any]:
    given = variant.arguments
    arguments = [
        {
            "name": argument["name"],
            "value": given.get(argument["name"], argument["default"]),
            "set_by": "variant" if argument["name"] in given else "default",
            "help": argument["help"],
        }
        for argument in family.arguments
    ]
    return {
        "system": _system(family, entry),
        "arguments": arguments,
        "variants": [v.name for v in family.variants.values()],
        "weights": {tag: list(sources) for tag, sources in variant.weights.items()},
    }


def _described_by_building(name: str, image_size: int | None) -> dict[str, Any]:
    """Return the report of a model that the index does not hold: another library's, or one that this process registered."""
    from vitarium.catalog import preprocessing_of
    from vitarium.verbs.measuring import describe_model, measure_cost, stages_of

    model = describe_model(name, **({} if image_size is None else {"image_size": image_size}))
    return {
        "name": name,
        "summary": first_paragraph(type(model).__doc__),
        **_cost(measure_cost(name, image_size, memory=True)),
        "num_classes": getattr(model, "num_classes", None),
        "stages": stages_of(model),
        "preprocessing": preprocessing_of(model).to_dict(),
    }


def _system(family: IndexedFamily, entry: Entry) -> dict[str, str]:
    """Return the family's system; for a base that several systems use, its module."""
    if entry.slug == entry.module:
        return {"slug": family.slug, "title": entry.summary, "room": entry.module.split(".")[1], "authors_code": "none"}
    system = find_system(entry.slug)
    return {"slug": system.slug, "title": system.title, "room": system.room, "authors_code": system.authors_code}


def describe_file(path: str) -> dict[str, Any]:
    """Return the contents of a file: the record of a saved model; for other files, the first tensors and the models that they fit.

    Raises:
        CheckpointError: missing, damaged or unsafe.
    """
    from vitarium.catalog.checkpoints import models_that_fit
    from vitarium.catalog.record import read_record
    from vitarium.catalog.states import RECORD, read_weights

    weights = read_weights(path)
    tensors = weights.forms[0]
    report: dict[str, Any] = {
        "file": str(weights.path),
        "bytes": weights.path.stat().st_size,
        "tensors": len(tensors),
        "values": sum(t.numel() for t in tensors.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "inside": weights.opened,
    }
    if RECORD in weights.metadata:
        record = read_record(weights.metadata[RECORD], str(weights.path)).model_dump(mode="json", exclude={"data": {"images": {"digests"}}})
        return report | {"model": record}
    first = {name: list(t.shape) for name, t in list(tensors.items())[:5]}
    return report | {"model": None, "first_tensors": first, "fits": models_that_fit(weights)}


def model_facts(report: dict[str, Any], unknown: tuple[str, ...]) -> dict[str, str]:
    """Return the cost, the classes and the preprocessing of a model by readable names; "?" for costs that are not known."""
    rows = {"parameters": "?" if "params" in unknown else f"{short(report['params'])}  ({report['bytes'] / 1e6:.1f} MB)"}
    if "macs" in unknown or report["macs"] is not None:
        size = f"at {report['image_size']}x{report['image_size']} pixels"
        rows["MACs"] = f"{'?' if 'macs' in unknown else short(report['macs'])}  {size}"
        memory = "?" if "peak_memory" in unknown else f"{report['peak_memory_mb']:.1f} MB"
        rows["memory"] = f"{memory}  at most in one forward pass of one image"
    pre = report["preprocessing"]
    scale = f"mean {numbers(pre['mean'])}, std {numbers(pre['std'])}"
    preprocessing = f"{pre['image_size']} px, {pre['interpolation']}, crop {pre['crop_pct']:g}, {scale}"
    return {**rows, "classes": str(report["num_classes"]), "preprocessing": preprocessing}


def family_facts(report: dict[str, Any]) -> dict[str, str]:
    """Return the variants, the weights and the paper of a model of the library by readable names."""
    weights = "\n".join(f"{report['name']}.{tag}  {', '.join(sources)}" for tag, sources in report["weights"].items())
    system = report["system"]
    return {
        "variants": ", ".join(report["variants"]),
        "weights": weights or "none known",
        "paper": system["title"],
        "authors' code": system["authors_code"],
    }


def file_facts(report: dict[str, Any]) -> dict[str, str]:
    """Return the contents of a file (see `describe_file`) by readable names."""
    from vitarium.catalog.methods import call_text, option_text

    record = report["model"]
    rows = {
        "size": f"{report['bytes'] / 1e6:.1f} MB",
        "tensors": f"{report['tensors']} with {short(report['values'])} values ({', '.join(report['dtypes'])})",
    }
    if record is None:
        rows |= {"inside": " > ".join(report["inside"])} if report["inside"] else {}
        return {**rows, "fits": ", ".join(report["fits"]) or "no model of ours"}
    labels, pre = record["labels"] or [], record["preprocessing"]
    rows |= {
        "model": record["name"],
        "arguments": ", ".join(f"{k}={option_text(v)}" for k, v in record["arguments"].items()) or "the variant's",
        "labels": ", ".join(labels[:10]) + (f" ... ({len(labels)})" if len(labels) > 10 else "") if labels else "none",
        "preprocessing": "none" if pre is None else ", ".join(f"{k} {preparation_text(v)}" for k, v in pre.items() if v is not None),
        "methods": ", ".join(call_text(m["slug"], m["options"]) for m in record["methods"]) or "none",
        "trained on": _data(record["data"]),
    }
    return rows | ({"calibration": _calibration(record)} if record["temperature"] is not None else {})


def numbers(values: Any) -> str:
    """Join numbers with spaces: (0.485, 0.456) -> "0.485 0.456"."""
    return " ".join(f"{v:g}" for v in values)


def preparation_text(value: Any) -> str:
    """Return a value of a preprocessing as text; lists of numbers with spaces."""
    return numbers(value) if isinstance(value, list) else str(value)


def value_text(value: Any) -> str:
    """Return the value of an argument as text; lists with commas."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _calibration(record: dict[str, Any]) -> str:
    """Describe the temperature of a classifier, and what it did to the calibration error."""
    found, temperature = record["calibration"], f"temperature {record['temperature']:.3f}"
    if found is None:
        return temperature
    errors = f"calibration error {100 * found['error_before']:.2f} % before, {100 * found['error_after']:.2f} % after"
    return f"{temperature}, fitted on {found['fitted']} held-out images; on the other {found['measured']}: {errors}"


def _data(record: dict[str, Any] | None) -> str:
    """Describe the data of a model's training."""
    if record is None:
        return "unknown"
    images = f"{record['images']['count']} images of " if record["images"] else ""
    drawn, held_out = f"{100 * record['val_fraction']:g} % held out at random, seed {record['seed']}", record["held_out"]
    if held_out is None:
        split = f"{drawn}, if the data has no held-out part"
    else:
        split = drawn if held_out == "random" else f"held out: the data's own part {held_out}"
    return f"{images}{record['source']} ({split})"
