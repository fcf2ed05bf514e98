"""Describe the contents of a weights file, for `vitarium info FILE`."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from vitarium.cli.console import out, pairs, short, table


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


def print_file(report: dict[str, Any]) -> None:
    """Print the contents of a file as tables."""
    console, record = out(), report["model"]
    rows = {
        "size": f"{report['bytes'] / 1e6:.1f} MB",
        "tensors": f"{report['tensors']} with {short(report['values'])} values ({', '.join(report['dtypes'])})",
    }
    if record is None:
        console.print(f"[bold]{escape(str(report['file']))}[/]  [dim]weights without a record[/]\n")
        rows |= {"inside": " > ".join(report["inside"])} if report["inside"] else {}
        rows["fits"] = ", ".join(report["fits"]) or "no model of ours"
        console.print(pairs(rows))
        first = table("tensor", "shape", title="The first tensors")
        for name, shape in report["first_tensors"].items():
            first.add_row(escape(name), " x ".join(map(str, shape)) or "scalar")
        return console.print(first)
    console.print(f"[bold]{escape(str(report['file']))}[/]  [dim]saved by vitarium {escape(str(record['vitarium']))}[/]\n")
    labels, pre = record["labels"] or [], record["preprocessing"]
    rows |= {
        "model": record["name"],
        "arguments": ", ".join(f"{k}={v}" for k, v in record["arguments"].items()) or "the variant's",
        "labels": ", ".join(labels[:10]) + (f" ... ({len(labels)})" if len(labels) > 10 else "") if labels else "none",
        "preprocessing": "none" if pre is None else ", ".join(f"{k} {v}" for k, v in pre.items()),
        "methods": ", ".join(m["slug"] for m in record["methods"]) or "none",
        "trained on": _data(record["data"]),
    }
    rows |= {"calibration": _calibration(record)} if record["temperature"] is not None else {}
    console.print(pairs(rows))


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
    return f"{images}{record['source']} (seed {record['seed']}, {100 * record['val_fraction']:g} % held out if it has no parts)"
