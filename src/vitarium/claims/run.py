"""Running claims: train the arms, judge, write the ledger. A killed run goes on where it was, claim by claim and arm by arm."""

from __future__ import annotations

import datetime
import hashlib
import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from vitarium.claims.experiment import Arm, Comparison, Measured, find_claim, gain_and_error, judge, together
from vitarium.claims.ledger import Entry, read_ledger, write_entry
from vitarium.files import write_json

Progress = Callable[[str], None]


def silent(line: str) -> None:
    """Progress that is not shown."""


def run_claim(slug: str, *, out: Path | None = None, cache: Path | None = None, progress: Progress = silent) -> Entry:
    """Run one claim and write its entry.

    Args:
        slug: the system.
        out: folder of the ledger; the package's own by default.
        cache: folder in which each trained arm's value is kept, so that a run that was killed goes on; None keeps nothing.
        progress: called with a line for each arm and seed.

    Returns:
        the entry, as written.

    Raises:
        UsageError: unknown slug, or no claim yet.
    """
    from vitarium.reports.machine import describe_machine

    claim, start = find_claim(slug), time.perf_counter()
    trainer = _Trainer(slug, cache / f"{slug}.json" if cache else None, progress)
    comparisons = [_compare(comparison, trainer) for comparison in claim.compare()]
    entry = Entry(
        slug=slug,
        says=claim.says,
        method=claim.method,
        verdict=together([c["verdict"] for c in comparisons]),
        comparisons=comparisons,
        seconds=round(time.perf_counter() - start + trainer.saved_seconds, 1),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=describe_machine(),
        commit=_commit(),
    )
    write_entry(entry, out)
    trainer.forget()
    return entry


def run_claims(
    slugs: Sequence[str],
    *,
    out: Path | None = None,
    cache: Path | None = None,
    jobs: int = 1,
    progress: Progress = silent,
) -> list[Entry]:
    """Run several claims, `jobs` at a time, the longest first.

    A claim that fails stops no other; its error is raised when all others are through.

    Args:
        slugs: the systems.
        out: folder of the ledger; the package's own by default.
        cache: folder that remembers what is done, so that the same call goes on after it was killed; None keeps nothing.
        jobs: processes, each with its share of the processor's cores.
        progress: called with a line for each arm and seed; with several jobs it must be a function of a module, as it is called in them.

    Returns:
        the entries, in the order of `slugs`.

    Raises:
        UsageError: unknown slug, or no claim yet; before anything runs.
        Exception: of the first claim that failed.
    """
    claims = [find_claim(slug) for slug in slugs]
    batch = hashlib.sha256(json.dumps([sorted(slugs), str(out)]).encode()).hexdigest()[:12]
    file = cache / f"batch-{batch}.json" if cache and len(slugs) > 1 else None
    done: dict[str, Entry] = {k: Entry(**v) for k, v in json.loads(file.read_text()).items()} if file and file.exists() else {}
    if done:
        progress(f"going on: {len(done)} of {len(slugs)} are done")
    took = {entry.slug: entry.seconds for entry in read_ledger()}
    claims.sort(key=lambda c: -took.get(c.slug, 60 * c.minutes))
    rest = [c.slug for c in claims if c.slug not in done]
    failed: list[Exception] = []
    for slug, found in _run_all(rest, out, cache, jobs, progress):
        if isinstance(found, Exception):
            progress(f"{slug}: {type(found).__name__}: {found}")
            failed.append(found)
            continue
        done[slug] = found
        if file:
            write_json(file, {k: entry.to_dict() for k, entry in done.items()})
    if failed:
        raise failed[0]
    if file:
        file.unlink(missing_ok=True)
    return [done[slug] for slug in slugs]


def _run_all(
    slugs: list[str], out: Path | None, cache: Path | None, jobs: int, progress: Progress
) -> Iterator[tuple[str, Entry | Exception]]:
    """Each claim's entry, or what it raised, as it comes."""
    if jobs == 1:
        for slug in slugs:
            try:
                found: Entry | Exception = run_claim(slug, out=out, cache=cache, progress=progress)
            except Exception as raised:
                found = raised
            yield slug, found
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        running = {pool.submit(_run_in_process, slug, out, cache, threads, progress): slug for slug in slugs}
        for future in as_completed(running):
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            yield running[future], error or future.result()


def _run_in_process(slug: str, out: Path | None, cache: Path | None, threads: int, progress: Progress) -> Entry:
    import torch

    torch.set_num_threads(threads)
    return run_claim(slug, out=out, cache=cache, progress=progress)


def _compare(comparison: Comparison, trainer: _Trainer) -> dict[str, Any]:
    method = trainer.values(comparison.method)
    baseline = None if comparison.baseline is None else trainer.values(comparison.baseline)
    gain, error = gain_and_error(method["values"], baseline["values"] if baseline else None)
    return {
        "says": comparison.says,
        "method": method,
        "baseline": baseline,
        "gain": gain,
        "error": error,
        "at_least": comparison.at_least,
        "verdict": judge(gain, error, comparison.at_least),
    }


class _Trainer:
    """Values of arms; equal arms of one claim are trained once, and kept in a file while the claim runs."""

    def __init__(self, slug: str, file: Path | None, progress: Progress):
        self.slug, self.file, self.progress = slug, file, progress
        self.known: dict[str, dict[str, float]] = json.loads(file.read_text()) if file and file.exists() else {}
        self.saved_seconds = 0.0
        """Time that an earlier, interrupted run spent on arms of this one."""
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

    def forget(self) -> None:
        if self.file:
            self.file.unlink(missing_ok=True)


def key_of(arm: Arm, seed: int) -> str:
    """Under what an arm's value is kept."""
    return hashlib.sha256(f"{arm.key()} {seed}".encode()).hexdigest()


def train_arm(arm: Arm, seed: int) -> float:
    """Train one arm with one seed; its accuracy on the held-out part, 0 to 1."""
    import torch

    from vitarium.catalog import create_model
    from vitarium.data import open_data
    from vitarium.training import ClassificationLearner, fit, load_recipe

    budget = f"budget.steps={arm.steps}" if arm.steps else f"budget.minutes={(arm.seconds or 0) / 60}"
    rest = [f"{key}={json.dumps(value)}" for key, value in arm.overrides.items()]
    recipe = load_recipe(arm.recipe, [budget, f"seed={seed}", "eval_every=1.0", *rest])
    data = open_data(arm.data, val_fraction=arm.val_fraction)
    torch.manual_seed(seed)
    model = create_model(arm.model, num_classes=len(data.classes), image_size=arm.image_size or data.image_size, **arm.options)
    with tempfile.TemporaryDirectory() as folder:
        result = fit(ClassificationLearner.create(model, data, recipe), data, recipe, Path(folder))
    return result.metrics["accuracy"]


def _commit() -> str:
    """Short hash of the checkout that this code runs from; "" where there is none."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty=+"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
