"""Push a saved model with its card to the Hugging Face hub."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitarium.errors import CheckpointError, UsageError
from vitarium.files import atomic_path, write_text, written_by_us
from vitarium.verbs.opening import Notify, quiet
from vitarium.verbs.result import Result

WEIGHTS, README = "model.safetensors", "README.md"


@dataclass(repr=False)
class Pushed(Result):
    """A model on the hub, or the folder of what would be pushed.

    Attributes:
        repository: "OWNER/NAME".
        address: of its page; "" if nothing was pushed.
        folder: with the files, if nothing was pushed; else None.
        files: names of the files.
        notes: what was left as it was.
    """

    repository: str
    address: str
    folder: Path | None
    files: list[str]
    notes: list[str]

    @property
    def source(self) -> str:
        """Name under which every command takes the model."""
        return f"hf:{self.repository}"

    def facts(self) -> dict[str, Any]:
        use = f"vitarium predict IMAGE --model {self.source}"
        place = {"folder": self.folder} if self.folder else {"address": self.address, "use": use}
        return {
            "repository": self.repository,
            "files": ", ".join(self.files),
            **place,
            **({"note": "; ".join(self.notes)} if self.notes else {}),
        }

    def to_dict(self) -> dict[str, Any]:
        folder = None if self.folder is None else str(self.folder)
        return {**vars(self), "folder": folder, "source": self.source}


def push(
    file: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    license: str | None = None,
    message: str = "Push with vitarium",
    output: str | os.PathLike[str] | None = None,
    notify: Notify = quiet,
) -> Pushed:
    """Push a file of `vitarium.save` and its model card to the Hugging Face hub; `vitarium.load("hf:OWNER/NAME", fetch=True)` reads it.

    The repository is created if it does not exist. Its model.safetensors is replaced, and its README.md if it is a card of vitarium. The
    hub client's own login is used (`hf auth login`). Absolute paths of the data and in the recipe are shortened to their last part.

    Args:
        file: the file.
        repository: "OWNER/NAME".
        private: of a repository that is created.
        license: of the weights, an identifier of the hub such as "apache-2.0", or "other"; None: the card says that it is not recorded.
        message: of the commit.
        output: write what would be pushed into this folder, and push nothing.
        notify: called with messages about progress.

    Raises:
        UsageError: a name of another form, a licence that the hub does not know, no login, or no right to write.
        CheckpointError: a file that was not written by `save`, or the hub is out of reach.
    """
    from vitarium.reports.card import card
    from vitarium.reports.licenses import check_license

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", repository, re.ASCII) or ".." in repository:
        raise UsageError(f"the repository must have the form OWNER/NAME, got {repository!r}")
    check_license(license)
    with without_paths(Path(file)) as public:
        text = card(public, license=license, repository=repository)
        if output is not None:
            return write_folder(Path(file), public, repository, text, Path(output))
        notes = upload(public, repository, text, private=private, message=message, notify=notify)
    from huggingface_hub import constants

    files = [WEIGHTS] if notes else [WEIGHTS, README]
    return Pushed(repository, f"{constants.ENDPOINT}/{repository}", None, files, notes)


@contextlib.contextmanager
def without_paths(file: Path) -> Iterator[Path]:
    """Yield a file whose record names no folders of this machine: of paths of data and in the recipe only the last part is kept.

    It is the file itself if there are none, else a copy that is removed afterwards.
    """
    from vitarium.catalog.saving import change_record
    from vitarium.reports.card import read_facts

    record = read_facts(file).record
    changes: dict[str, Any] = {}
    if record.data is not None and bare(record.data.source) != record.data.source:
        changes["data"] = record.data.model_copy(update={"source": bare(record.data.source)})
    if record.run is not None and bare(record.run.recipe) != record.run.recipe:
        changes["run"] = record.run.model_copy(update={"recipe": bare(record.run.recipe)})
    if record.base is not None and bare(record.base.weights_from) != record.base.weights_from:
        changes["base"] = record.base.model_copy(update={"weights_from": bare(record.base.weights_from)})
    if not changes:
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, WEIGHTS)
        shutil.copyfile(file, copy)
        change_record(copy, **changes)
        yield copy


def bare(value: Any) -> Any:
    """Return a plain value in which each absolute path is replaced by its last part."""
    if isinstance(value, dict):
        return {key: bare(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [bare(entry) for entry in value]
    if not isinstance(value, str):
        return value
    kind, colon, rest = value.partition(":")
    if colon and len(kind) > 1 and is_absolute(rest):  # "csv:/data/labels.csv,separator=comma"
        return f"{kind}:{bare(rest)}"
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_absolute(value) else value


def is_absolute(path: str) -> bool:
    """Return whether a text is an absolute path or one below a home folder, on any system; addresses are not."""
    return path.startswith(("~", "\\")) or (path.startswith("/") and not path.startswith("//")) or bool(re.match(r"[A-Za-z]:[/\\]", path))


def write_folder(file: Path, public: Path, repository: str, text: str, folder: Path) -> Pushed:
    """Write the files of a push into a folder.

    Args:
        file: the model's file, which may be the folder's model.safetensors already.
        public: what is written (see `without_paths`).

    Raises:
        UsageError: the folder holds a file of one of the names that is not this model or a card.
    """
    from vitarium.reports.card import is_card

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give a folder for {WEIGHTS} and {README}")
    weights, readme = folder / WEIGHTS, folder / README
    if weights.exists() and not weights.samefile(file) and not written_by_us(weights):
        raise UsageError(f"{weights} exists and was not written by vitarium; choose another folder")
    if readme.exists() and not is_card(readme.read_text(encoding="utf-8", errors="replace")):
        raise UsageError(f"{readme} exists and is no card of vitarium; choose another folder")
    if not (weights.exists() and weights.samefile(file)):
        with atomic_path(weights) as temporary:
            shutil.copyfile(public, temporary)
    write_text(readme, text)
    return Pushed(repository, "", folder, [WEIGHTS, README], [])


def upload(file: Path, repository: str, text: str, *, private: bool, message: str, notify: Notify) -> list[str]:
    """Create the repository if it does not exist, and commit the files; return notes on files that were left as they were.

    Raises:
        UsageError: no login, or no right to write.
        CheckpointError: the hub is out of reach, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from vitarium.catalog.hub import hub_or_cache, reason_of

    with hub_or_cache(repository) as reason:
        if reason:
            raise CheckpointError(
                f"cannot reach the hub ({reason}): push again with a network, or write the folder with --output FOLDER and upload it "
                f"elsewhere with 'hf upload {repository} FOLDER'"
            )
        api = HfApi()
        try:
            notify(f"Creating {repository}")
            api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
            kept = foreign_readme(api, repository)
            operations = [CommitOperationAdd(WEIGHTS, str(file))]
            operations += [] if kept else [CommitOperationAdd(README, text.encode())]
            notify(f"Uploading {file.stat().st_size / 1e6:.1f} MB")
            api.create_commit(repository, operations, commit_message=message, repo_type="model")
        except HfHubHTTPError as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403):
                raise UsageError(
                    f"the hub does not let you write {repository}: log in with 'hf auth login' and a token that may write"
                ) from None
            raise CheckpointError(f"the hub refuses to take {repository}: {reason_of(error)}") from error
        except Exception as error:  # whatever the client's HTTP library of the day raises
            raise CheckpointError(
                f"the connection to the hub broke while {repository} was pushed: {reason_of(error)}; push again"
            ) from error
    return ["README.md of the repository is no card of vitarium, so it was not replaced"] if kept else []


def foreign_readme(api: Any, repository: str) -> bool:
    """Return whether a repository has a README.md that is no card of vitarium."""
    from vitarium.reports.card import is_card

    if not api.file_exists(repository, README, repo_type="model"):
        return False
    with tempfile.TemporaryDirectory() as folder:  # outside of the cache, in which files are not renewed
        readme = Path(api.hf_hub_download(repository, README, local_dir=folder))
        return not is_card(readme.read_text(encoding="utf-8", errors="replace"))
