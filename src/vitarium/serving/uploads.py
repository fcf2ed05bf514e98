"""Images that clients send: read into memory within limits, and checked before they wait in the queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from vitarium.data.bad_files import BrokenImage
from vitarium.data.images import begins_like_image, image_size
from vitarium.serving.limits import Limits
from vitarium.serving.refusals import Gone, Refusal
from vitarium.serving.state import State
from vitarium.texts import printable

RAW_TYPES = ("", "image/", "application/octet-stream", "application/x-www-form-urlencoded")
"""Beginnings of the content types of a body that is one image. The last is what `curl --data-binary` sends unless another is given; what
the bytes are is found from the bytes."""
ACCEPTED = "send one image as the body (Content-Type image/* or application/octet-stream), or files as multipart/form-data"
LONGEST_NAME = 200


@dataclass(frozen=True)
class Upload:
    """One image of a request.

    Attributes:
        name: as the client calls it, without folders; it is only repeated in the answer.
        content: the file's bytes.
    """

    name: str
    content: bytes


class Share:
    """The bytes of one request's body among those that a server holds.

    Args:
        state: of the server.
    """

    def __init__(self, state: State):
        self.state, self.bytes = state, 0

    def check(self, more: int) -> None:
        """Raise Refusal (429) if there is no room for so many further bytes."""
        most = self.state.limits.held_bytes
        if self.state.held + more > most:
            held = f"the bodies of other requests take {(self.state.held - self.bytes) / 1e6:.1f} MB"
            raise Refusal(429, f"{held}, and all together may take {most / 1e6:g} MB; send it again later", retry=1)

    def take(self, more: int) -> None:
        """Count bytes that arrived; raises as `check`, and then none are counted."""
        self.check(more)
        self.bytes += more
        self.state.held += more


@contextlib.contextmanager
def entered(state: State) -> Iterator[Share]:
    """Count an open request, and what its body takes until it is answered.

    Raises:
        Refusal: too many are open (429); the body is not read.
    """
    if state.open_requests >= state.limits.open_requests:
        raise Refusal(429, f"{state.open_requests} requests are open, which is the limit", retry=1)
    state.open_requests += 1
    share = Share(state)
    try:
        yield share
    finally:
        state.open_requests -= 1
        state.held -= share.bytes


class _InMemory(MultiPartParser):
    """Parser that keeps files in memory; the whole body is limited."""

    spool_max_size = 2**40


async def read_uploads(request: Request, share: Share) -> list[Upload]:
    """Read the images of a request's body.

    A body counts as it arrives, not as its header announces it: clients that announce much and send nothing take no room from others.

    Raises:
        Refusal: a body that is too large (413), too slow (408), of another type (415), cannot be parsed (400), or has no room beside those
            of other requests (429).
        Gone: the client has closed the connection.
    """
    limits = share.state.limits
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    multipart = kind == "multipart/form-data"
    if not multipart and not any(kind == known or (known.endswith("/") and kind.startswith(known)) for known in RAW_TYPES):
        raise Refusal(415, f"a body of the type {printable(kind[:100], '')} is not accepted: {ACCEPTED}")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "compressed bodies are not accepted; send the image as it is")
    _check_length(request, share)
    try:
        async with asyncio.timeout(limits.body_timeout):
            if multipart:
                return await _parts(request, share)
            content = b"".join([chunk async for chunk in _chunks(request, share)])
            request.state.stripped = b"\r" not in content and b"\n" not in content  # as `curl --data` sends a file
            return [Upload("", content)]
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {limits.body_timeout:g} seconds") from None
    except ClientDisconnect:
        raise Gone from None


def check_image(upload: Upload, limits: Limits) -> None:
    """Check that bytes begin as an image of an accepted format and size.

    Raises:
        Refusal: another format (415), a damaged beginning (422), or too many pixels (413).
    """
    if not upload.content:
        raise Refusal(422, "the body is empty" if not upload.name else f"{upload.name} is empty")
    try:
        width, height = image_size(upload.content, upload.name)
    except BrokenImage as error:
        known = begins_like_image(upload.content[:16])
        raise Refusal(422 if known else 415, f"{upload.name}: {error.reason}" if upload.name else error.reason) from None
    if width * height > limits.pixels:
        has = f"{width} x {height} pixels are {width * height / 1e6:.1f} megapixels"
        raise Refusal(413, f"{has}; at most {limits.limit_megapixels:g} are accepted: make the image smaller")


def _check_length(request: Request, share: Share) -> None:
    length, limits = request.headers.get("content-length", ""), share.state.limits
    if length.isdecimal():
        if int(length) > limits.body_bytes:
            raise _too_large(int(length), limits)
        share.check(int(length))


def _too_large(size: int, limits: Limits) -> Refusal:
    return Refusal(413, f"the body has {size / 1e6:.1f} MB or more; at most {limits.limit_mb:g} MB are accepted")


async def _chunks(request: Request, share: Share) -> AsyncGenerator[bytes, None]:
    """Yield the body; raises Refusal as soon as it is longer than the limit, whatever its headers say, or there is no room for it."""
    limits = share.state.limits
    async for chunk in request.stream():
        if share.bytes + len(chunk) > limits.body_bytes:
            raise _too_large(share.bytes + len(chunk), limits)
        share.take(len(chunk))
        yield chunk


async def _parts(request: Request, share: Share) -> list[Upload]:
    limits = share.state.limits
    parser = _InMemory(request.headers, _chunks(request, share), max_files=limits.files, max_fields=limits.files)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal(400, f"the multipart body cannot be read: {error.message}") from None
    except (ValueError, LookupError) as error:  # broken headers of parts
        raise Refusal(400, f"the multipart body cannot be read: {str(error)[:200]}") from None
    try:
        uploads = [Upload(plain_name(value.filename), await value.read()) for _, value in form.multi_items() if _is_file(value)]
    finally:
        await form.close()
    if not uploads:
        raise Refusal(422, f"the form holds no file: {ACCEPTED}")
    return uploads


def _is_file(value: Any) -> bool:
    return isinstance(value, UploadFile)


def plain_name(name: str | None) -> str:
    """Return a file's name without folders and control characters, for the answer."""
    return printable((name or "").replace("\\", "/").rpartition("/")[2][:LONGEST_NAME], "") or "image"
