"""Running of claims: train the arms, compute the verdict, write the ledger. An interrupted run resumes, claim by claim and arm by arm."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vitarium.claims.experiment import TO_THE_END, Arm, Comparison, Measured, find_claim
from vitarium.claims.judging import gain_of, judge, judge_equal, together, uncalibrated
from vitarium.claims.ledger import Entry, read_ledger, write_entry
from vitarium.engine import Engine, Job, RunEvent, as_engine, run_all
from vitarium.files import write_json

Progress = Callable[[str], None]
ARMS = "arms.json"


def silent(line: str) -> None:
    """Ignore progress."""


def run_claim(slug: str, *, out: Path | None = None, cache: Path | None = None, progress: Progress = silent) -> Entry:
    """Run one claim in this process and write its entry.

    Args:
        slug: the system.
        out: folder of the ledger; the package's own by default.
        cache: folder for the value of each trained arm, so that an interrupted run resumes; None: no cache.
        progress: called with a line for each arm and seed.

    Returns:
        the entry, as written.

    Raises:
        UsageError: unknown slug, or a system without a claim.
    """
    file = cache / f"{slug}.json" if cache else None
    entry = measure_claim(slug, file, progress)
    write_entry(entry, out)
    if file:
        file.unlink(missing_ok=True)
    return entry


def measure_claim(slug: str, file: Path | None = None, progress: Progress = silent) -> Entry:
    """Run the experiment of a claim and return its entry with the verdict; the ledger is not changed.

    Args:
        slug: the system.
        file: file for the value of each trained arm; None: no file.
        progress: called with a line for each arm and seed.
    """
    from vitarium.engine.machine import describe_machine

    claim, start = find_claim(slug), time.perf_counter()
    trainer = _Trainer(slug, file, progress)
    comparisons = [_compare(comparison, trainer) for comparison in claim.compare()]
    return Entry(
        slug=slug,
        says=claim.says,
        method=claim.method,
        verdict=together([c["verdict"] for c in comparisons]),
        comparisons=comparisons,
        seconds=round(time.perf_counter() - start + trainer.saved_seconds, 1),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=describe_machine(),
        commit=_commit(),
        task=claim.task,
        weights=claim.weights,
    )


def run_claims(
    slugs: Sequence[str],
    *,
    out: Path | None = None,
    cache: Path | None = None,
    engine: str | Engine = "local",
    address: str | None = None,
    jobs: int | None = None,
    progress: Progress = silent,
) -> list[Entry]:
    """Run several claims on an engine, the longest first, and write their entries into the ledger.

    A claim that fails does not stop the others; it is tried once more, and its error is raised when all others are done.

    Args:
        slugs: the systems.
        out: folder of the ledger; the package's own by default.
        cache: folder that records finished claims, so that the same call resumes on any engine after an interruption; on a cluster it must
            be on a shared disk. None: no record.
        engine: "local", "ray", or an `engine.Engine`.
        address: of a running Ray cluster.
        jobs: claims run in parallel, see `engine.Engine`.
        progress: called in this process with a line for each arm and seed.

    Returns:
        the entries, in the order of `slugs`.

    Raises:
        UsageError: unknown slug, or a system without a claim; before anything runs.
        Exception: of the first claim that failed.
    """
    where = as_engine(engine, address=address, jobs=jobs)
    claims = [find_claim(slug) for slug in slugs]
    batch = hashlib.sha256(json.dumps([sorted(slugs), str(out)]).encode()).hexdigest()[:12]
    took = {entry.slug: entry.seconds for entry in read_ledger()}
    claims.sort(key=lambda c: -took.get(c.slug, 60 * c.minutes))
    with tempfile.TemporaryDirectory() as temporary:
        folder = cache / f"batch-{batch}" if cache else Path(temporary)
        runs = [Job(claim.slug, _measure, folder / claim.slug, {"slug": claim.slug}) for claim in claims]
        outcomes = run_all(runs, where, progress=_Recorder(len(runs), out, progress))
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        done = {outcome.job.name: Entry(**outcome.value) for outcome in outcomes if outcome.value is not None}
        shutil.rmtree(folder, ignore_errors=True)
    return [done[slug] for slug in slugs]


def _measure(folder: Path, report: Callable[[Any], None], *, slug: str) -> dict[str, Any]:
    """Run one claim as a task of an engine."""
    return measure_claim(slug, folder / ARMS, report).to_dict()


class _Recorder:
    """Write finished claims into the ledger, and convert the engine's events to lines."""

    def __init__(self, count: int, out: Path | None, progress: Progress):
        self.count, self.out, self.progress = count, out, progress
        self.kept = 0

    def __call__(self, event: RunEvent) -> None:
        slug = event.job.name
        if event.kind == "progress":
            self.progress(event.value)
        elif event.kind in ("retried", "failed"):
            again = "; it is tried once more" if event.kind == "retried" else ""
            self.progress(f"{slug}: {type(event.error).__name__}: {event.error}{again}")
        elif event.kind == "kept":
            self.kept += 1
            self.progress(f"{slug}: done before ({self.kept} of {self.count})")
        if event.kind in ("kept", "finished") and event.value is not None:
            self.write(Entry(**event.value))

    def write(self, entry: Entry) -> None:
        """Write an entry, unless the ledger holds a later one of this claim."""
        if not any(there.slug == entry.slug and there.date > entry.date for there in read_ledger(self.out)):
            write_entry(entry, self.out)


def _compare(comparison: Comparison, trainer: _Trainer) -> dict[str, Any]:
    method = trainer.values(comparison.method)
    baseline = None if comparison.baseline is None else trainer.values(comparison.baseline)
    arms = [arm for arm in (method, baseline) if arm is not None]
    gain = gain_of(method["values"], baseline["values"] if baseline else None, exact=comparison.exact)
    within, margin = comparison.within, comparison.margin
    reason = "" if comparison.exact else uncalibrated(
        within,
        [arm["mean"] for arm in arms],
        unit=method["unit"],
        at_least=comparison.at_least if margin is None else margin,
        counts=[len(arm["values"]) for arm in arms],
        images=[held_out(arm) for arm in (comparison.method, comparison.baseline) if arm is not None],
    )  # fmt: skip
    verdict = judge(gain, comparison.at_least) if margin is None else judge_equal(gain, margin)
    return {
        "says": comparison.says,
        "method": method,
        "baseline": baseline,
        "gain": gain.mean,
        "error": gain.error,
        "interval": None if math.isinf(gain.low) else [gain.low, gain.high],
        "at_least": comparison.at_least,
        "margin": margin,
        "range": None if within is None else [within.floor, within.ceiling],
        "exact": comparison.exact,
        "uncalibrated": reason,
        "verdict": "inconclusive" if reason else verdict,
    }


def held_out(arm: Arm | Measured) -> int | None:
    """Return the number of held-out images behind the values of an arm; None where that is no question."""
    if isinstance(arm, Measured):
        return arm.images
    from vitarium.data import open_data

    return len(open_data(arm.data, val_fraction=arm.val_fraction).val)


class _Trainer:
    """Train arms; equal arms of one claim are trained once, and their values are kept in a file while the claim runs."""

    def __init__(self, slug: str, file: Path | None, progress: Progress):
        self.slug, self.file, self.progress = slug, file, progress
        self.known: dict[str, dict[str, float]] = json.loads(file.read_text()) if file and file.exists() else {}
        self.saved_seconds = 0.0
        """Time that an earlier, interrupted run spent on the arms of this one."""
        self._earlier = set(self.known)

    def values(self, arm: Arm | Measured) -> dict[str, Any]:
        if isinstance(arm, Measured):
            values, unit = list(map(float, arm.values)), arm.unit
        else:
            values, unit = [self._value(arm, seed) for seed in range(arm.seeds)], "%"
        return {"label": arm.label, "values": values, "mean": sum(values) / len(values), "unit": unit}

    def _value(self, arm: Arm, seed: int) -> float:
        key = key_of(arm, seed)
        if key not in self.known:
            start = time.perf_counter()
            accuracy = 100 * train_arm(arm, seed)
            self.known[key] = {"value": accuracy, "seconds": time.perf_counter() - start}
            self.progress(f"{self.slug}: {arm.label}, seed {seed}: {accuracy:.1f} % in {self.known[key]['seconds']:.0f} s")
            if self.file:
                write_json(self.file, self.known)
        elif key in self._earlier:
            self._earlier.remove(key)
            self.saved_seconds += self.known[key]["seconds"]
        return self.known[key]["value"]


def key_of(arm: Arm, seed: int) -> str:
    """Return the cache key of one arm and seed."""
    return hashlib.sha256(f"{arm.key()} {seed}".encode()).hexdigest()


def train_arm(arm: Arm, seed: int) -> float:
    """Train one arm with one seed; return its accuracy on the held-out part, 0 to 1."""
    import torch

    from vitarium.catalog import create_model
    from vitarium.data import open_data
    from vitarium.training import ClassificationLearner, fit, load_recipe

    budget = f"budget.steps={arm.steps}" if arm.steps else f"budget.minutes={(arm.seconds or 0) / 60}"
    rest = [f"{key}={json.dumps(value)}" for key, value in arm.overrides.items()]
    calibrated = TO_THE_END if arm.recipe == "pico" else ()
    recipe = load_recipe(arm.recipe, [*calibrated, budget, f"seed={seed}", "eval_every=1.0", *rest])
    data = open_data(arm.data, val_fraction=arm.val_fraction)
    torch.manual_seed(seed)
    model = create_model(arm.model, num_classes=len(data.classes), image_size=arm.image_size or data.image_size, **arm.options)
    with tempfile.TemporaryDirectory() as folder:
        result = fit(ClassificationLearner.create(model, data, recipe), data, recipe, Path(folder))
    return result.metrics["accuracy"]


def _commit() -> str:
    """Return the short hash of the checkout that this code runs from; "" if there is none."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty=+"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
