"""Access to the Hugging Face hub: one short attempt, then the cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

TIMEOUT = 5.0
"""Seconds for the first connection to the hub."""
OFFLINE = "HF_HUB_OFFLINE is set"


@contextlib.contextmanager
def hub_or_cache(repository: str) -> Iterator[str]:
    """Yield "" if the hub can be reached, else the reason, with the hub's client in its offline mode until the context ends.

    Without a connection the client retries every file for half a minute, and timm and transformers ask for several; in offline mode they
    take cached files or raise an error at once. The mode is the process's: other threads' requests fail at once too until the context ends.

    Args:
        repository: "OWNER/NAME" that will be read; a folder ("./..." or "/...") needs no hub.
    """
    from huggingface_hub import constants

    if repository.startswith((".", "/")):
        yield ""
        return
    if constants.HF_HUB_OFFLINE:
        yield OFFLINE
        return
    reason = unreachable(repository)
    if not reason:
        yield ""
        return
    # A switch of the whole process: transformers and diffusers take local_files_only, but timm has no argument for it, and each of them
    # asks for several files by functions of its own. The client reads it at each request, so that it can be set and restored here.
    constants.HF_HUB_OFFLINE = True
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE = False


def unreachable(repository: str) -> str:
    """Return the reason why the hub gives no answer within `TIMEOUT`; "" if it answers, whatever it answers."""
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, "config.json"), timeout=TIMEOUT)  # one attempt, through the user's proxy
    except (HfHubHTTPError, HFValidationError):  # a name that is no repository's: the caller's library names that
        return ""
    except Exception as error:  # whatever the client's HTTP library of the day raises
        return reason_of(error)
    return ""


def advice(repository: str, reason: str) -> str:
    """Return what to do about a repository that is in no cache while the hub is out of reach."""
    from huggingface_hub import constants

    return (
        f"cannot reach the hub {constants.ENDPOINT} ({reason}), and not all files of {repository} are in its cache: with a network, run "
        f"'hf download {repository}' and copy {constants.HF_HUB_CACHE} here, or pass checkpoint=PATH (--checkpoint PATH) to a file you have"
    )


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, shortened."""
    return next((line.strip()[:120] for line in str(error).splitlines() if line.strip()), type(error).__name__)
