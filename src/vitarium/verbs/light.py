"""Predictions of a classifier from its kept graph, without PyTorch: half the time of a call for a few images is its import."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vitarium.catalog.answers import FORMS, Form, class_names
from vitarium.catalog.preprocessing import Preprocessing
from vitarium.efficiency.runtimes.cache import Entry, digest_of, exporters, own_name, slots_of
from vitarium.efficiency.runtimes.sessions import Session, open_session, version_of
from vitarium.errors import VitariumError
from vitarium.verbs.opening import Notify

if TYPE_CHECKING:
    import numpy as np


def predict(
    files: Sequence[str], model: str | os.PathLike[str], runtime: str, *, limit: int, batch_size: int, notify: Notify
) -> tuple[list[dict[str, Any]], Form] | None:
    """Return the rows of `vitarium.verbs.predict.Predictions` and the form of the answers.

    None: there is no graph of the file that was checked in this runtime, its answers need the model, or an image needs the usual path.

    Args:
        files: images.
        model: a file of `vitarium.save`.
        runtime: "onnxruntime" or "openvino".
        limit: length of ranked answers.
        batch_size: images per call of the graph.
        notify: called with messages about progress.
    """
    from vitarium.data.clips import is_video_file

    if not os.path.isfile(model) or any(map(is_video_file, files)):
        return None
    digest, versions = digest_of(model), exporters()
    slots = [slot for name in (own_name(runtime), "forward") for slot in slots_of(model, name)]
    found = filter(None, (slot.read(digest, versions) for slot in slots))
    kept = next((one for one in found if version_of(runtime) in one[0].checked), None)
    if kept is None:
        return None
    entry, content = kept
    try:
        form, preprocessing = FORMS[entry.about["task"]["name"]], Preprocessing(**entry.about["preprocessing"])
        if preprocessing.frames is not None or not entry.single or entry.batch not in (None, 1):
            return None
        session = open_session(runtime, content)
    except Exception:  # a record or a graph that cannot be used: the usual path makes it again, or names the fault
        return None
    try:
        return list(_rows(files, session, entry, form, preprocessing, limit, entry.batch or batch_size, notify)), form
    except VitariumError:
        return None  # the usual path raises it with its context


def _rows(
    files: Sequence[str],
    session: Session,
    entry: Entry,
    form: Form,
    preprocessing: Preprocessing,
    limit: int,
    batch_size: int,
    notify: Notify,
) -> Iterator[dict[str, Any]]:
    """Yield the row of each file, in order."""
    import numpy as np

    for start in range(0, len(files), batch_size):
        some = files[start : start + batch_size]
        read = [_read(file, preprocessing) for file in some]
        arrays = [one for one in read if not isinstance(one, str)]
        logits = iter(session(np.stack(arrays))[0]) if arrays else iter(())
        for file, one in zip(some, read, strict=True):
            if isinstance(one, str):
                yield {"image": file, "error": one}
                continue
            row = next(logits)
            yield {"image": file} | form.answer(row, class_names(entry.about["labels"], len(row)), limit, entry.about["temperature"])
        notify(f"Looking at images: {start + len(some)} of {len(files)}")


def _read(file: str, preprocessing: Preprocessing) -> np.ndarray | str:
    """Return a prepared image, or the reason why it cannot be read."""
    from vitarium.data.bad_files import BrokenImage
    from vitarium.data.images import open_image

    try:
        return preprocessing.array(open_image(file))
    except BrokenImage as error:
        return error.reason
