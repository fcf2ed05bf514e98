"""The application: routes over one model."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from vitarium.catalog.create import preprocessing_of
from vitarium.errors import UsageError, VitariumError, nearest
from vitarium.serving.answers import Answer, answer_jobs, warm_up_image
from vitarium.serving.guard import Guard
from vitarium.serving.limits import LONGEST_RANKING
from vitarium.serving.page import page_of
from vitarium.serving.refusals import Gone, Refusal
from vitarium.serving.state import State
from vitarium.serving.uploads import Upload, check_image, entered, read_uploads
from vitarium.serving.worker import Job, Worker
from vitarium.texts import printable
from vitarium.version import __version__

IMAGE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}}}
            },
        },
    }
}
"""Description of the body for /openapi.json."""
TopK = Annotated[int | None, Query(ge=1, le=LONGEST_RANKING, description="Length of ranked answers.")]


def make_app(state: State) -> FastAPI:
    """Return the ASGI application of a server; its start starts the worker."""
    state.worker = Worker(partial(answer_jobs, state.task, state.model), state.limits, state.metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        state.worker.start()
        try:
            yield
        finally:
            state.stopping = True
            await asyncio.to_thread(state.worker.stop)

    # no page of documentation: those of FastAPI load scripts from elsewhere
    app = FastAPI(title="Vitarium", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    for path, endpoint in routes(state).items():
        method, body = ("POST", IMAGE_BODY) if path in ("/predict", "/draw") else ("GET", None)
        app.add_api_route(path, endpoint, methods=[method], openapi_extra=body, response_model=None)
    state.routes = frozenset([*routes(state), "/openapi.json"])
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _unknown)
    app.add_middleware(Guard, state=state)
    app.state.vitarium = state
    return app


def warm_up(state: State) -> None:
    """Answer one grey image, so that a model that cannot is refused before it is served, and the first client does not wait longer.

    Raises:
        UsageError: there is no answer.
    """
    side = preprocessing_of(state.model).image_size
    job = Job(warm_up_image(side), state.limits.top_k, True, deadline=float("inf"))
    try:
        [answer] = answer_jobs(state.task, state.model, [job])
    except VitariumError as error:
        raise UsageError(f"the model does not answer a grey image of {side} x {side} pixels: {error}") from error
    if answer.error:
        raise UsageError(f"the model does not answer a grey image of {side} x {side} pixels: {answer.error}")
    state.ready = True


def routes(state: State) -> dict[str, Callable[..., Any]]:
    """Return the endpoints by path."""
    html, policy = page_of(state)

    async def page() -> Response:
        """Return the page of an image drop."""
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    async def healthz() -> Response:
        """Return whether the model answers."""
        return JSONResponse({"ready": state.ready}, 200 if state.ready else 503)

    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return PlainTextResponse(state.metrics.text(state.worker.waiting), media_type="text/plain; version=0.0.4")

    async def info() -> Response:
        """The model, its labels and preprocessing, and the limits."""
        return JSONResponse(state.info)

    async def predict(request: Request, top_k: TopK = None, draw: bool = False) -> Response:
        """Answer one image or several, as `vitarium predict --json`; with draw=true also with the drawing as a data URL; one image
        with `Accept: image/png` gives the drawing itself."""
        if "image/png" in request.headers.get("accept", ""):
            return await drawing(request, top_k)
        check_query(request, "top_k", "draw")
        with entered(state) as share, sent_by_curl(request):
            uploads = await read_uploads(request, share)
            answers = await answers_for(state, request, uploads, top_k or state.limits.top_k, draw)
        rows = [{"image": upload.name, **values_of(answer)} for upload, answer in zip(uploads, answers, strict=True)]
        return JSONResponse({"model": state.info["model"], "task": state.task.name, "images": rows})

    async def drawing(request: Request, top_k: TopK = None) -> Response:
        """Answer one image with the drawing as PNG: segments over it, or the restored image."""
        check_query(request, "top_k", "draw")
        with entered(state) as share, sent_by_curl(request):
            uploads = await read_uploads(request, share)
            if len(uploads) > 1:
                raise Refusal(422, f"a drawing shows one image, got {len(uploads)}; send them one by one")
            [answer] = await answers_for(state, request, uploads, top_k or state.limits.top_k, True)
        if answer.drawing is None:
            raise Refusal(406, f"answers of the task {state.task.name} are not drawn; take JSON from /predict")
        return Response(answer.drawing, media_type="image/png")

    return {
        "/": page,
        "/healthz": healthz,
        "/metrics": metrics,
        "/info": info,
        "/predict": predict,
        "/draw": drawing,
    }


def check_query(request: Request, *known: str) -> None:
    """Check the names of the parameters in a request's address.

    Raises:
        Refusal: an unknown one (422).
    """
    for name in request.query_params:
        if name not in known:
            shown = printable(name[:100], "")
            raise Refusal(422, f"unknown parameter {shown!r}{nearest(shown, known)} (parameters: {', '.join(known)})")


@contextlib.contextmanager
def sent_by_curl(request: Request) -> Iterator[None]:
    """Add the right command to a refusal of the bytes that `curl --data` sends, which strips the line ends of a file, or sends its name.

    `--data-binary` announces the same type, and sends the bytes as they are.
    """
    try:
        yield
    except Refusal as refusal:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if refusal.status not in (415, 422) or kind != "application/x-www-form-urlencoded" or not getattr(request.state, "stripped", True):
            raise
        address = f"{request.url.scheme}://{request.url.netloc}{request.url.path}"
        advice = f"curl --data changes the bytes of a file; send it with: curl -F file=@IMAGE {printable(address, '')}"
        raise Refusal(refusal.status, f"{refusal.reason}; {advice}") from None


async def answers_for(state: State, request: Request, uploads: list[Upload], top_k: int, draw: bool) -> list[Answer]:
    """Check the images of a request, queue them, and wait for their answers.

    Of several images, those that cannot be read get an answer with the reason.

    Raises:
        Refusal: no image can be read (413, 415 or 422), the queue is full (429), the time is over (504), or the model failed (500).
        Gone: the client has closed the connection; images that have not begun are dropped.
    """
    refused: dict[int, Refusal] = {}
    for number, upload in enumerate(uploads):
        try:
            check_image(upload, state.limits)
        except Refusal as refusal:
            refused[number] = refusal
    if len(refused) == len(uploads):
        raise next(iter(refused.values()))
    deadline = time.monotonic() + state.limits.timeout
    jobs = {n: Job(upload.content, top_k, draw, deadline) for n, upload in enumerate(uploads) if n not in refused}
    state.worker.submit(list(jobs.values()))
    await finished(list(jobs.values()), request, state.limits.timeout)
    answers = [result_of(jobs[n]) if n in jobs else Answer({"error": refused[n].reason}) for n in range(len(uploads))]
    if all(answer.error for answer in answers):
        raise Refusal(422, str(answers[0].error))
    return answers


async def finished(jobs: list[Job], request: Request, timeout: float) -> None:
    """Wait until all jobs are done; else cancel those that have not begun.

    Raises:
        Refusal: the time is over (504).
        Gone: the client has closed the connection.
    """
    all_done: asyncio.Future[Any] = asyncio.gather(*(asyncio.wrap_future(job.answer) for job in jobs), return_exceptions=True)
    gone: asyncio.Future[Any] = asyncio.ensure_future(request.receive())  # the body has been read: the next message is the disconnection
    try:
        done, _ = await asyncio.wait([all_done, gone], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if all_done in done:
            return
        if gone in done:
            raise Gone
        raise Refusal(504, f"no answer within {timeout:g} seconds; {len(jobs)} images were dropped", retry=5)
    finally:
        gone.cancel()
        if not all_done.done():
            all_done.cancel()
        for job in jobs:
            if job.answer.cancel():
                job.content = b""  # the job may stay in the queue for a while, and its bytes no longer count


def result_of(job: Job) -> Answer:
    """Return the answer of a job that is done.

    Raises:
        Refusal: the model cannot take the image (422), its time was over before it began (504), or the server stopped (503).
        Exception: an error of the model.
    """
    if job.answer.cancelled():
        late = time.monotonic() > job.deadline
        raise (
            Refusal(504, "the image waited too long and was dropped", retry=5) if late else Refusal(503, "the server is stopping", retry=5)
        )
    error = job.answer.exception()
    if isinstance(error, VitariumError):
        raise Refusal(422, str(error))
    if error is not None:
        raise error
    return job.answer.result()


def values_of(answer: Answer) -> dict[str, Any]:
    """Return an answer's values, with its drawing as a data URL if there is one."""
    if answer.drawing is None:
        return answer.values
    return {**answer.values, "drawing": f"data:image/png;base64,{base64.b64encode(answer.drawing).decode()}"}


async def _invalid(_request: Request, error: Exception) -> Response:
    rows = error.errors() if isinstance(error, RequestValidationError) else []
    reasons = "; ".join(f"{row['loc'][-1]}: {row['msg']}" for row in rows)
    return JSONResponse({"error": reasons}, 422)


async def _unknown(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    reason = {404: "there is no such route; routes: /, /predict, /draw, /info, /healthz, /metrics, /openapi.json"}
    other = f"{request.method} is not accepted here" if status == 405 else str(getattr(error, "detail", ""))
    return JSONResponse({"error": reason.get(status, other)}, status, headers=getattr(error, "headers", None))
