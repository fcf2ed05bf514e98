"""The model card of a saved file: README.md with the metadata that the Hugging Face hub reads, made from the file's record alone."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vitarium.errors import CheckpointError
from vitarium.files import write_text
from vitarium.texts import printable

if TYPE_CHECKING:
    from vitarium.catalog.record import DataRecord, Record
    from vitarium.training.tasks.base import Task

CARD_MARK = "<!-- written by vitarium from the file's record; remove this line to keep changes of your own -->"
PIPELINES = {
    "classify": "image-classification",
    "multilabel": "image-classification",
    "segment": "image-segmentation",
    "restore": "image-to-image",
    "generate": "unconditional-image-generation",
    "retrieve": "image-feature-extraction",
    "encode": "image-feature-extraction",
}
"""Task -> kind of model on the hub."""
SHOWN_LABELS = 50


def card(file: str | os.PathLike[str], *, license: str | None = None, repository: str | None = None) -> str:
    """Return the model card of a file of `vitarium.save` as Markdown.

    Args:
        file: the file.
        license: of the weights, an identifier such as "apache-2.0"; None: the card says that it is not known.
        repository: "OWNER/NAME" on the hub, for the commands; None: those for the file.

    Raises:
        CheckpointError: the file is missing, damaged, or was not written by `save`.
    """
    return render(read_facts(file), license, repository)


def card_path(file: str | os.PathLike[str]) -> Path:
    """Return the place of a file's card: README.md beside model.safetensors, NAME.README.md beside NAME.safetensors."""
    path = Path(file)
    return path.with_name("README.md" if path.name == "model.safetensors" else f"{path.stem}.README.md")


def write_card(file: str | os.PathLike[str]) -> Path | None:
    """Write the card beside a file; a file of that name that is not a card of ours stays, and None is returned."""
    path = card_path(file)
    if path.exists() and not is_card(path.read_text(encoding="utf-8", errors="replace")):
        return None
    write_text(path, card(file))
    return path


def is_card(text: str) -> bool:
    """Return whether a text is a card that has not been adopted by its user."""
    return CARD_MARK in text


# ---- facts


@dataclass(frozen=True)
class Facts:
    """Contents of a card.

    Attributes:
        file: its name, without folders.
        record: its record.
        task: its task.
        values, bytes: number of values in its tensors, and size of the file.
        dtypes: of its tensors.
    """

    file: str
    record: Record
    task: Task
    values: int
    bytes: int
    dtypes: list[str]


def read_facts(file: str | os.PathLike[str]) -> Facts:
    """Read the facts of a saved file. No model is built."""
    from vitarium.catalog.record import read_record
    from vitarium.catalog.states import RECORD, existing, looks_like_safetensors, read_safetensors
    from vitarium.training.tasks import task_of

    path = existing(os.fspath(file))
    state, metadata = read_safetensors(path) if looks_like_safetensors(path) else ({}, {})
    if RECORD not in metadata:
        raise CheckpointError(f"{path} was not written by vitarium.save, so that nothing is known about it; load and save it first")
    record = read_record(metadata[RECORD], str(path))
    described = SimpleNamespace(training_record=record.training(), spec=SimpleNamespace(name=record.name))
    task = task_of(described)  # type: ignore[arg-type] # it reads these two attributes
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in state.values()})
    return Facts(path.name, record, task, sum(t.numel() for t in state.values()), path.stat().st_size, dtypes)


# ---- text


def render(facts: Facts, license: str | None, repository: str | None) -> str:
    """Return the card's Markdown."""
    import yaml

    stem = Path(facts.file).stem
    name = repository or (facts.record.name if stem == "model" else stem)
    head = yaml.safe_dump(metadata(facts, license, name), sort_keys=False, allow_unicode=False, width=1000)
    parts = [
        f"---\n{head}---\n{CARD_MARK}\n\n# {escaped(name)}",
        introduction(facts),
        section("Measured", measured(facts)),
        section("Calibration", calibration_words(facts)),
        section("Data", data_words(facts)),
        section("Training", training_words(facts)),
        section("Methods", method_words(facts)),
        section("Size and input", table([*size_rows(facts), *input_rows(facts)])),
        section("Use", use_words(facts, repository)),
        section("Limits", "\n".join(f"- {line}" for line in limits(facts, license))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def metadata(facts: Facts, license: str | None, name: str) -> dict[str, Any]:
    """Return the front matter: what the hub indexes."""
    record, pipeline = facts.record, PIPELINES.get(facts.task.name)
    tags = ["vitarium", facts.task.name, record.name, *dict.fromkeys(method.slug for method in record.methods)]
    values: dict[str, Any] = {"library_name": "vitarium", "tags": [plain(tag) for tag in tags]}
    values |= {"license": license} if license else {}
    values |= {"pipeline_tag": pipeline} if pipeline else {}
    current = current_results(facts)
    if current and record.data is not None:
        data = plain(record.data.name)
        metrics = [{"type": plain(key), "name": plain(title), "value": value} for key, title, value, _ in current]
        result = {"task": {"type": pipeline or facts.task.name}, "dataset": {"type": data, "name": data}, "metrics": metrics}
        values["model-index"] = [{"name": plain(name), "results": [result]}]
    return values


def current_results(facts: Facts) -> list[tuple[str, str, float, str]]:
    """Return (key, title, value, text) of numbers that were measured with the file's own methods; [] if there are none."""
    results = facts.record.results
    return shown_metrics(facts) if results and results.methods == slugs(facts) else []


def shown_metrics(facts: Facts) -> list[tuple[str, str, float, str]]:
    """Return (key, title, value, text with unit) of the recorded metrics, the primary one first."""
    assert facts.record.results is not None
    primary, numbers = facts.task.primary, facts.record.results.metrics
    ordered = sorted(numbers, key=lambda key: key != primary.name)
    rows = []
    for key in ordered:
        [(title, text)] = list(facts.task.texts({key: numbers[key]}).items())[:1] or [(key, f"{numbers[key]:.4g}")]
        rows.append((key, title, numbers[key], text))
    return rows


def slugs(facts: Facts) -> list[str]:
    """Return the slugs of the file's methods."""
    return [method.slug for method in facts.record.methods]


def introduction(facts: Facts) -> str:
    """Return the first paragraph."""
    record = facts.record
    library = f" of {escaped(record.library)}" if record.library else ""
    labels = f", {len(record.labels)} classes" if record.labels else ""
    return (
        f"{escaped(record.name)}{library}, a model for the task *{facts.task.name}*{labels}, saved by vitarium {escaped(record.vitarium)}."
    )


def measured(facts: Facts) -> str:
    """Return the table of metrics, and which images and methods they are of."""
    results = facts.record.results
    if results is None or not results.metrics:
        return ""
    before = "" if results.methods == slugs(facts) else f" **before** the methods below were applied (then: {listed(results.methods)})"
    where = f"On {counted(results.images, 'image')} of the part {escaped(results.part)}{before}:"
    return f"{where}\n\n{table([(title, text) for _, title, _, text in shown_metrics(facts)], ('metric', 'value'))}"


def calibration_words(facts: Facts) -> str:
    """Return the temperature, and what it did to the probabilities; "" without one."""
    temperature, found = facts.record.temperature, facts.record.calibration
    if temperature is None:
        return ""
    words = f"The logits are divided by the temperature {temperature:.3f} before the softmax"
    if found is None:
        return f"{words}."
    rows = [
        ("calibration error", f"{100 * found.error_before:.2f} %", f"{100 * found.error_after:.2f} %"),
        ("cross entropy", f"{found.loss_before:.4f}", f"{found.loss_after:.4f}"),
    ]
    results = facts.record.results
    earlier = " The numbers under Measured were taken without it." if results and results.metrics and not facts.record.methods else ""
    where = (
        f"it was fitted on {counted(found.fitted, 'held-out image')}.{earlier} On the other {counted(found.measured, 'held-out image')}:"
    )
    return f"{words}; {where}\n\n" + table(rows, ("metric", "without", "with"))


def data_words(facts: Facts) -> str:
    """Return what is known about the training data."""
    data, labels = facts.record.data, facts.record.labels
    rows: list[tuple[str, str]] = []
    if data is not None:
        count = f"{data.images.count:,}" if data.images else "unknown"
        source = data.source if "/" not in data.source and "\\" not in data.source else Path(data.source.replace("\\", "/")).name
        rows += [("data", data.name), ("source", source), ("training images", count), ("held out", split_words(data))]
    if labels:
        more = f", ... ({len(labels)})" if len(labels) > SHOWN_LABELS else ""
        rows.append(("classes", ", ".join(labels[:SHOWN_LABELS]) + more))
    return table(rows) if rows else ""


def split_words(data: DataRecord) -> str:
    """Return how the held-out part was chosen; for a file that does not say, both ways."""
    drawn = f"{100 * data.val_fraction:g} % at random (seed {data.seed})"
    if data.held_out is None:
        return f"{drawn}, unless the data has a held-out part of its own"
    return drawn if data.held_out == "random" else f"the data's own part {data.held_out}"


def training_words(facts: Facts) -> str:
    """Return the recipe as YAML, which `vitarium train` reads."""
    import yaml

    run, learner = facts.record.run, facts.record.training().learner
    if run is None:
        return f"Learner: {escaped(learner.name)}. The recipe is not recorded." if learner else ""
    text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=False, width=1000)
    return f"{run.steps:,} optimizer steps by this recipe (`vitarium train RECIPE.yaml`):\n\n{fenced(text, 'yaml')}"


def method_words(facts: Facts) -> str:
    """Return the methods as --apply takes them; options at their defaults are left out."""
    from vitarium.catalog.methods import call_text

    return "\n".join(f"- {code(call_text(method.slug, method.options))}" for method in facts.record.methods)


def size_rows(facts: Facts) -> list[tuple[str, str]]:
    """Return rows on the size of the file."""
    return [("file", f"{facts.bytes / 1e6:.1f} MB"), ("values in its tensors", f"{facts.values:,} ({', '.join(facts.dtypes)})")]


def input_rows(facts: Facts) -> list[tuple[str, str]]:
    """Return rows on the preprocessing."""
    fields = facts.record.preprocessing or {}
    texts = {name: ", ".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for name, v in fields.items() if v is not None}
    return [(name.replace("_", " "), text) for name, text in texts.items()]


def use_words(facts: Facts, repository: str | None) -> str:
    """Return commands and Python."""
    source = f"hf:{repository}" if repository else facts.file
    load = f"vitarium.load({source!r}, fetch=True)" if repository else f"vitarium.load({source!r})"
    command = facts.task.usage.format(file=shlex.quote(plain(source)))
    lines = ["import vitarium", "", f"model = {load}"]
    if facts.task.result_kind is not None:
        lines.append(f"print(vitarium.predict(['image.jpg'], {source!r}))")
    return f"{fenced(command, 'bash')}\n\n{fenced(chr(10).join(lines), 'python')}"


def limits(facts: Facts, license: str | None) -> list[str]:
    """Return what the card does not know, and what to expect of the model."""
    record, lines = facts.record, []
    if record.results is None:
        lines.append("No measured numbers are recorded: measure with `vitarium evaluate` before you rely on it.")
    elif record.results.methods != slugs(facts):
        lines.append("The numbers are of the model before its methods were applied: measure again with `vitarium evaluate`.")
    else:
        lines.append("The numbers are of held-out images of the same data; images from elsewhere can be harder.")
    if facts.task.classifies and record.temperature is None:
        lines.append("The probabilities are not calibrated (`vitarium evaluate --calibrate`).")
    if record.data is None:
        lines.append("The training data is not known.")
    if record.untrained:
        lines.append("Its classifier was not trained: predictions mean nothing until it is.")
    if record.base is not None:
        base = record.base.weights_from
        named = base if not os.path.isabs(base) else Path(base).name
        lines.append(f"The file holds only what was trained; it also needs the weights {escaped(named)}.")
    if not license:
        lines.append("The licence of the weights and of the data is not recorded.")
    lines.append("Not examined here: fairness between groups of people, robustness, and images that show none of the classes.")
    return lines


# ---- Markdown


def section(title: str, text: str) -> str:
    """Return a section; "" without text."""
    return f"## {title}\n\n{text}" if text else ""


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ("", "")) -> str:
    """Return a table, whose first row is `head`."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(map(escaped, row))} |" for row in rows)]
    return "\n".join(lines)


def fenced(text: str, language: str) -> str:
    """Return a block of code, with a fence that the text does not close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def code(text: str) -> str:
    """Return a text of others as code within a line, in which nothing is Markdown."""
    text = plain(text)
    mark = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{mark}{space}{text}{space}{mark}"


def counted(number: int, name: str) -> str:
    """Return a number with its noun: "1 image", "2,000 images"."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def escaped(text: str) -> str:
    """Return a text of others on one line of Markdown, in which nothing is a link, an image, HTML or the end of a cell."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", plain(text)).replace("://", ":\\//")


def plain(text: str) -> str:
    """Return a text of others on one line."""
    return printable(str(text), "")


def listed(names: list[str]) -> str:
    """Return names in a row, "none" without any."""
    return ", ".join(map(escaped, names)) or "none"
