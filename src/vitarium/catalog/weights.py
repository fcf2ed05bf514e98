"""Download of published weights; nothing else in the library fetches files.

A file in the hub client's or torch's cache is used without a request.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vitarium.catalog.hub import TIMEOUT, reason_of
from vitarium.catalog.rebuilding import refuse_files
from vitarium.catalog.registry import find_model
from vitarium.errors import CheckpointError, UsageError, nearest

DEFAULT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of a repository's weights file, in order of preference."""
TOGETHER = " + "
"""Separator between the sources of a model that was released in several files: "transformer.pth + tokenizer.pth"."""


def fetch_pretrained(name: str, tag: str | None = None) -> Path | str:
    """Return the file with a model's published weights, from the first reachable source; several files are joined by `TOGETHER`.

    Args:
        name: one of our models, such as "swin_tiny".
        tag: key of the variant's table of weights, such as "in22k"; None for the first.

    Raises:
        UsageError: the model has no published weights, or none of this tag.
        CheckpointError: no source is reachable; the message names the file to fetch and the option that takes it.
    """
    family, variant = find_model(name)
    tags = family.weights.get(variant, {})
    if not tags:
        having = [f"{family.name}_{v}" for v, table in family.weights.items() if table]
        others = f"; those of the family with weights: {', '.join(having)}" if having else ""
        raise UsageError(f"no published weights of {name} are known{others}; pass checkpoint=PATH (--checkpoint PATH) to a file you have")
    if tag is not None and tag not in tags:
        raise UsageError(f"{name} has no weights {tag!r}{nearest(tag, tags)} (there are {', '.join(tags)})")
    sources = tags[tag] if tag is not None else next(iter(tags.values()))
    failures = []
    for source in sources:
        try:
            files = [fetch(part) for part in source.split(TOGETHER)]
            return files[0] if len(files) == 1 else TOGETHER.join(map(str, files))
        except CheckpointError as error:
            failures.append(str(error))
    raise CheckpointError(f"cannot fetch the weights of {name}: " + "; ".join(failures))


def fetch(source: str, *, remedy: str = "pass checkpoint=PATH (--checkpoint PATH)") -> Path:
    """Return the local file of a source, downloaded unless it is in a cache.

    Args:
        source: a path; "hf:OWNER/NAME[/FILE]"; "timm:NAME.TAG" (looked up in timm's registry); or an http(s) address. All but the path
            may end in "#sha256=HEX" (at least the first 8 digits), which is checked.
        remedy: what to do with a file that was fetched by other means, for the message.

    Raises:
        CheckpointError: it cannot be fetched, or does not have the given hash.
        UsageError: the source has none of these forms.
    """
    refuse_files(source)
    if not is_address(source):
        return Path(source)  # the reader reports a missing file
    place, digest = _split_digest(source)
    if place.startswith("timm:"):
        return _fetch_timm(place.removeprefix("timm:"), digest)
    if place.startswith("hf:"):
        path = _fetch_hub(place.removeprefix("hf:"), remedy)
        _check_digest(path, digest, place)
        return path
    return _fetch_url(place, digest, remedy)


def in_place_of(source: str) -> str:
    """Return the `remedy` of `fetch` for a source that is the whole model."""
    return f"give the file in place of {source}"


def is_address(source: str) -> bool:
    """Return whether a source of weights is fetched from elsewhere, unless it is in a cache; False for a path."""
    return source.startswith(("hf:", "timm:", "http://", "https://"))


def cached(source: str) -> Path | None:
    """Return the local file of an address (see `fetch`) from a cache, None if it is in none. Makes no request.

    Raises:
        CheckpointError: the cached file does not have the given hash.
        UsageError: the source has none of the forms.
    """
    place, digest = _split_digest(source)
    path: Path | None = None
    if place.startswith("timm:"):
        address = _timm_address(place.removeprefix("timm:"), digest)
        return cached(address)
    if place.startswith("hf:"):
        import huggingface_hub as hub

        repository, files = _hub_files(place.removeprefix("hf:"))
        found = [hub.try_to_load_from_cache(repository, file) for file in files]
        path = next((Path(file) for file in found if isinstance(file, str)), None)
    elif is_address(place):
        path = _cache_of_torch(place)
    if path is None or not path.is_file():
        return None
    _check_digest(path, digest, place)
    return path


def published_sources(name: str, tag: str | None) -> list[str]:
    """Return the sources of a model's published weights, in order of preference.

    Args:
        name: one of our models, "timm/NAME", or "hf/OWNER/NAME".
        tag: see `fetch_pretrained`; of our models only.
    """
    if name.startswith("timm/"):
        return [f"timm:{name.removeprefix('timm/')}"]
    if name.startswith("hf/"):
        return [f"hf:{name.removeprefix('hf/')}"]
    family, variant = find_model(name)
    tags = family.weights.get(variant, {})
    return list(tags.get(tag, ()) if tag else next(iter(tags.values()), ()))


def has_published(name: str) -> bool:
    """Return whether published weights of a model are known, those of its tag if the name has one. Makes no request.

    Args:
        name: one of our models, "timm/NAME", or "hf/OWNER/NAME", whose weights are those of its repository.

    Raises:
        UsageError: no model has this name.
    """
    if name.startswith("hf/"):
        return True
    if name.startswith("timm/"):
        import timm

        from vitarium.catalog.foreign import TIMM_PICO

        bare = name.removeprefix("timm/")
        cfg = timm.models.get_pretrained_cfg(bare) if bare not in TIMM_PICO and timm.is_model(bare) else None
        return cfg is not None and bool(cfg.has_weights)
    model, _, tag = name.partition(".")
    family, variant = find_model(model)
    tags = family.weights.get(variant, {})
    return tag in tags if tag else bool(tags)


def _split_digest(source: str) -> tuple[str, str]:
    place, _, fragment = source.partition("#")
    if fragment and not re.fullmatch(r"sha256=[0-9a-f]{8,64}", fragment):
        raise UsageError(f"after # a source takes sha256= and 8 to 64 hex digits, got {fragment!r} in {source!r}")
    if place.startswith("https://download.pytorch.org/") and not fragment:  # file names there end in their hash
        found = re.search(r"-([0-9a-f]{8,64})\.\w+$", place)
        return place, found[1] if found else ""
    return place, fragment.removeprefix("sha256=")


def _check_digest(path: Path, digest: str, place: str) -> None:
    if digest:
        with open(path, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if not actual.startswith(digest):
            got = actual[: len(digest)]
            raise CheckpointError(f"{path} is not the file that {place} names: expected sha256 {digest}, got {got}; delete it, fetch again")


def _by_hand(url: str, remedy: str) -> str:
    return f"fetch {url} on a machine with a network and {remedy}"


# ---- timm's registry


def _fetch_timm(name: str, digest: str) -> Path:
    """Fetch weights that timm lists as NAME.TAG, from its hub repository or else from the original address."""
    return fetch(_timm_address(name, digest))


def _timm_address(name: str, digest: str) -> str:
    """Return the address of weights that timm lists as NAME.TAG."""
    import timm

    cfg = timm.models.get_pretrained_cfg(name)
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        raise CheckpointError(f"timm {timm.__version__} has no weights {name!r}; a newer or older timm may")
    suffix = f"#sha256={digest}" if digest else ""
    if cfg.hf_hub_id:
        file = f"/{cfg.hf_hub_filename}" if cfg.hf_hub_filename else ""
        return f"hf:{cfg.hf_hub_id}{file}{suffix}"
    url = cfg.url if isinstance(cfg.url, str) or cfg.url is None else cfg.url[0]
    return f"{url}{suffix}"


# ---- the Hugging Face hub


def _fetch_hub(place: str, remedy: str) -> Path:
    """Return OWNER/NAME[/FILE] from the hub client's cache, else from the hub."""
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    repository, files = _hub_files(place)
    for file in files:
        cached = hub.try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    for file in files:
        url = hub.hf_hub_url(repository, file)
        try:
            hub.get_hf_file_metadata(url, timeout=TIMEOUT)  # one attempt; the download would retry for half a minute
            return Path(hub.hf_hub_download(repository, file))
        except RepositoryNotFoundError as error:
            raise CheckpointError(
                f"the hub shows no {repository} (misspelt, private, or gated: accept its terms and log in with `hf auth login`)"
            ) from error
        except Exception as error:  # whatever the client's HTTP library of the day raises
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue  # the hub has no such file
            raise CheckpointError(f"cannot reach the hub for {repository} ({reason_of(error)}): {_by_hand(url, remedy)}") from error
    raise CheckpointError(f"the hub's {repository} holds no {' or '.join(files)}; name its file: hf:{repository}/FILE")


def _hub_files(place: str) -> tuple[str, list[str]]:
    """Return the repository and the candidate files of OWNER/NAME[/FILE]."""
    parts = place.split("/")
    if len(parts) < 2 or not all(re.fullmatch(r"[\w.-]+", part) for part in parts):
        raise UsageError(f"a hub source is hf:OWNER/NAME or hf:OWNER/NAME/FILE, got 'hf:{place}'")
    return "/".join(parts[:2]), ["/".join(parts[2:])] if len(parts) > 2 else list(DEFAULT_FILES)


# ---- addresses


def _fetch_url(url: str, digest: str, remedy: str) -> Path:
    """Return the file of an address from torch's hub cache, else download it there: the file is verified and moved there only when
    complete.

    An interrupted download (beside the file, ending in .incomplete) is continued if the server supports it.
    """
    from filelock import FileLock

    path = _cache_of_torch(url)
    name = path.name
    if path.exists():
        _check_digest(path, digest, url)
        return path
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise CheckpointError(f"offline (HF_HUB_OFFLINE is set), and {path} is not there: {_by_hand(url, remedy)}")
    partial = path.with_name(f"{name}.incomplete")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{name}.lock")):
            if path.exists():  # another process has fetched it in the meantime
                _check_digest(path, digest, url)
                return path
            _download(url, partial, name)
            _check_digest(partial, digest, url)
            os.replace(partial, path)
    except CheckpointError:
        partial.unlink(missing_ok=True)
        raise
    except Exception as error:  # any error of the client's HTTP library or the disk
        raise CheckpointError(f"cannot download {name} ({reason_of(error)}): {_by_hand(url, remedy)}") from error
    return path


def _cache_of_torch(url: str) -> Path:
    """Return the place of an address in torch's hub cache."""
    import torch

    name = os.path.basename(unquote(urlsplit(url).path))
    if not name or name in (".", ".."):
        raise UsageError(f"{url} names no file")
    return Path(torch.hub.get_dir(), "checkpoints", name)


class _Partial(io.FileIO):
    """File of a download that limits restarts: a server that breaks off and cannot resume gets two more attempts."""

    restarts = 0

    def truncate(self, size: int | None = None) -> int:
        """Discard the content because the server restarts at the first byte."""
        self.restarts += 1
        if self.restarts > 2:
            raise OSError("the server breaks off and cannot continue a download; try again")
        return super().truncate(size)


def _download(url: str, path: Path, name: str) -> None:
    """Download an address to a path, resuming a partial file, with the hub client's function (progress, retries, length check)."""
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get

    size = None
    with contextlib.suppress(HfHubHTTPError):  # the server does not support HEAD; the download reports other errors
        size = hub.get_hf_file_metadata(url, timeout=TIMEOUT).size  # one attempt; the download would retry
    have = path.stat().st_size if path.exists() else 0
    if size is not None and have >= size:  # a partial file of another download, or a complete but unverified one
        path.unlink(missing_ok=True)
        have = 0
    with _Partial(path, "ab") as file:
        http_get(url, file, resume_size=have, displayed_filename=name)  # type: ignore[arg-type]
