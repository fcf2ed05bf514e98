"""Requests to a real server: equal answers in parallel, limits, clients that are gone or slow, and refusals with their reasons."""

import contextlib
import io
import json
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

import vitarium
from tests.serving.conftest import png, running
from vitarium.errors import UsageError
from vitarium.serving.answers import answer_jobs
from vitarium.serving.worker import Job
from vitarium.verbs.serve import create_app


@pytest.fixture(scope="module")
def served(model):
    with running(model) as one:
        yield one


def single_answer(model, tmp_path, content):
    file = tmp_path / "one.png"
    file.write_bytes(content)
    [row] = vitarium.predict(file, model, device="cpu").rows
    return {name: value for name, value in row.items() if name != "image"}


def answer_of(response):
    [row] = response.json()["images"]
    return {name: value for name, value in row.items() if name != "image"}


def until(condition):
    """Wait for a condition; the limit only ends a test that fails."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition was never met")


# ---- answers


def test_an_unknown_parameter_is_refused_with_the_known_ones(served):
    for path in ("/predict", "/draw"):
        response = served.post(png(0), f"{path}?topk=2")
        assert response.status_code == 422
        assert response.json()["error"].startswith("unknown parameter 'topk'; did you mean top_k? (parameters: top_k, draw)")


@pytest.mark.parametrize("content", [png(0).replace(b"\r", b"").replace(b"\n", b""), b"one.png", b""])
def test_what_curl_data_sends_is_refused_with_the_right_command(served, content):
    response = served.post(content, headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert response.status_code in (415, 422)
    assert response.json()["error"].endswith(f"send it with: curl -F file=@IMAGE {served.url}/predict")


def test_a_truncated_image_of_data_binary_is_not_blamed_on_curl(served):
    response = served.post(png(0)[:40], headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert response.status_code in (415, 422)
    assert "curl" not in response.json()["error"]


def test_requests_of_all_routes_are_counted(model):
    with running(model) as one:
        assert [one.get(path).status_code for path in ("/info", "/nothing", "/predict")] == [200, 404, 405]
        until(lambda: one.state.metrics.by_status() == {200: 1, 404: 1, 405: 1})


def test_32_parallel_images_get_their_single_answers_bit_by_bit(served, model, tmp_path):
    contents = [png(seed) for seed in range(32)]
    wanted = [single_answer(model, tmp_path, content) for content in contents]
    assert len({json.dumps(answer) for answer in wanted}) == 32  # a mixed-up answer would be seen
    with ThreadPoolExecutor(32) as pool:
        responses = list(pool.map(served.post, contents))
    assert [response.status_code for response in responses] == [200] * 32
    assert [answer_of(response) for response in responses] == wanted


def test_batches_keep_the_order_and_answers_up_to_the_last_bits(model, tmp_path):
    contents = [png(seed) for seed in range(12)]
    wanted = [single_answer(model, tmp_path, content)["predictions"] for content in contents]
    with running(model, batch_size=4, max_wait=60_000) as one, ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(one.post, contents))
        text = one.get("/metrics").text
    assert 'vitarium_batch_images_bucket{le="2"} 0\n' in text  # 12 images in 3 full batches
    assert "vitarium_batch_images_count 3\n" in text
    for response, rows in zip(responses, wanted, strict=True):
        found = answer_of(response)["predictions"]
        assert [row["label"] for row in found] == [row["label"] for row in rows]
        assert [row["probability"] for row in found] == pytest.approx([row["probability"] for row in rows], abs=1e-6)


def test_a_runtime_answers_as_predict_does_with_it(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (tmp_path / "one.png").write_bytes(png(7))
    small = vitarium.create_model("timm/vit_pico", num_classes=10, image_size=16, depth=1)  # quick to export
    vitarium.save(small, tmp_path / "small.safetensors")
    [wanted] = vitarium.predict(tmp_path / "one.png", tmp_path / "small.safetensors", runtime="onnxruntime", device="cpu").rows
    app = create_app(tmp_path / "small.safetensors", runtime="onnxruntime", device="cpu")
    state = app.state.vitarium
    assert state.info["runtime"] == "onnxruntime"
    [answer] = answer_jobs(state.task, state.model, [Job(png(7), 5, False, deadline=float("inf"))])
    assert answer.values["predictions"] == wanted["predictions"]


def test_several_files_of_one_form_and_one_that_is_broken(served, model, tmp_path):
    files = [("files", ("../../etc/a.png", png(1))), ("files", ("b.png", png(2)[:200])), ("files", ("C:\\x\\c\x1b.png", png(3)))]
    rows = served.client.post(f"{served.url}/predict", files=files).json()["images"]
    assert [row["image"] for row in rows] == ["a.png", "b.png", "c\\x1b.png"]
    assert rows[0]["predictions"] == single_answer(model, tmp_path, png(1))["predictions"]
    assert "cut off" in rows[1]["error"]
    assert rows[2]["predictions"] == single_answer(model, tmp_path, png(3))["predictions"]


def test_the_length_of_the_ranking(served):
    assert len(answer_of(served.post(png(0), "/predict?top_k=3"))["predictions"]) == 3
    assert len(answer_of(served.post(png(0), "/predict?top_k=500"))["predictions"]) == 10
    for wrong in ("0", "-1", "1e9", "five", "100000000000000000000"):
        response = served.post(png(0), f"/predict?top_k={wrong}")
        assert response.status_code == 422
        assert "top_k" in response.json()["error"]


def test_segments_are_drawn_as_by_predict(scene_model, tmp_path):
    (tmp_path / "one.png").write_bytes(png(5, 48))
    [wanted] = vitarium.predict(tmp_path / "one.png", scene_model, device="cpu", output=tmp_path / "answers").rows
    with running(scene_model) as one:
        row = one.post(png(5, 48), "/predict?draw=true").json()["images"][0]
        drawn = one.post(png(5, 48), "/draw")
        accepted = one.post(png(5, 48), headers={"Accept": "image/png"})
    assert row.pop("drawing").startswith("data:image/png;base64,")
    assert {**row, "image": wanted["image"], "drawing": wanted["drawing"]} == wanted
    assert drawn.headers["content-type"] == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(drawn.content))), np.asarray(Image.open(wanted["drawing"])))
    assert accepted.content == drawn.content


@pytest.fixture(scope="module")
def scene_model():
    return vitarium.create_model("kmax_deeplab_pico").eval()


def test_a_restored_image_is_the_answer():
    restorer = vitarium.create_model("drct_pico").eval()
    with running(restorer) as one:
        drawn = one.post(png(1, 16), "/draw")
    assert Image.open(io.BytesIO(drawn.content)).size == (16 * restorer.scale, 16 * restorer.scale)


def test_answers_without_a_drawing_are_not_acceptable_as_png(served):
    response = served.post(png(0), "/draw")
    assert response.status_code == 406
    assert "/predict" in response.json()["error"]


# ---- uploads of all kinds


def big_header(width, height):
    """Return a PNG of the given size whose pixels are missing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"")


SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
KINDS = [
    (b"", 422, "empty"),
    (b"PK\x03\x04" + bytes(60), 415, "not an image in an accepted format"),
    (SVG, 415, "SVG"),
    (b"<!doctype html><p>not found</p>", 415, "web page"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "not an image"),
    (png(0)[:300], 422, "cut off"),
    (b"\x89PNG\r\n\x1a\n" + bytes(40), 422, "damaged"),
    (big_header(30_000, 30_000), 422, "megapixels"),
    (big_header(9_000, 9_000), 413, "81.0 megapixels; at most 50"),
    (big_header(9_000, 2), 422, "times the other"),
]


@pytest.mark.parametrize(("content", "status", "reason"), KINDS)
def test_what_is_no_image_is_refused_with_the_reason(served, content, status, reason):
    response = served.post(content)
    assert response.status_code == status
    assert reason in response.json()["error"]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "application/octet-stream", "image/webp"])
def test_a_body_is_read_by_its_bytes_whatever_a_client_calls_it(served, kind):
    """`curl --data-binary` calls it a form unless it is asked for another type."""
    response = served.post(png(0), headers={"Content-Type": kind})
    assert answer_of(response) == answer_of(served.post(png(0)))
    assert served.post(b"a=1&b=2", headers={"Content-Type": kind}).status_code == 415


@pytest.mark.parametrize("kind", ["text/html", "application/json", "application/zip", "\x7f"])
def test_other_content_types_are_refused(served, kind):
    response = served.post(png(0), headers={"Content-Type": kind})
    assert response.status_code == 415
    assert "multipart/form-data" in response.json()["error"]
    assert served.post(png(0), headers={"Content-Encoding": "gzip"}).status_code == 415


def test_a_large_body_is_refused_before_it_is_sent(served):
    with socket.create_connection(served.address, timeout=60) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: 1000000000\r\n\r\nx")
        with client.makefile("rb") as answer:
            lines = [answer.readline() for _ in range(3)]
            rest = b""
            while not rest.endswith(b"}"):
                rest += answer.read(1)
    assert lines[0].startswith(b"HTTP/1.1 413")
    assert b"at most 20 MB" in rest


def test_a_large_body_without_a_length_is_refused_when_it_passes_the_limit(model):
    taken = []

    def endless():
        for _ in range(4000):
            taken.append(1)
            yield bytes(100_000)

    with running(model, limit_mb=0.5) as one, contextlib.suppress(httpx.TransportError):
        response = one.post(endless())
        assert response.status_code == 413
    assert len(taken) < 4000
    until(lambda: one.state.metrics.by_status() == {413: 1})


def test_too_many_files_and_forms_without_files(served):
    many = served.client.post(f"{served.url}/predict", files=[("files", (f"{i}.png", png(0))) for i in range(17)])
    assert many.status_code == 400
    assert "16" in many.json()["error"]
    none = served.post(b"--x--\r\n", headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert none.status_code == 422
    assert "no file" in none.json()["error"]
    for broken in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=\x7f"):
        assert served.post(png(0), headers={"Content-Type": broken}).status_code in (400, 422)


def fuzz_request(rng, seed):
    """Return body and headers of a random upload: images with changed bytes, other files, forms with odd names and parts."""
    content = [png(seed), png(seed)[: rng.integers(1, 400)], SVG, b"", b"PK\x03\x04" + bytes(99), rng.bytes(int(rng.integers(1, 3000)))]
    body = bytearray(content[rng.integers(len(content))])
    for place in rng.integers(0, max(1, len(body)), rng.integers(0, 6)):
        if body:
            body[place] = rng.integers(256)
    types = ["image/png", "image/../../x", "", "application/octet-stream", "text/html", "multipart/form-data", "application/zip"]
    if rng.random() < 0.5:
        return bytes(body), {"Content-Type": types[rng.integers(len(types))]}
    names = ["../../../etc/passwd", "/abs.png", "..\\..\\x.png", "a\0b.png", "x" * 5000, "%2e%2e%2fx", "CON", "a;rm -rf.png", "é\u202e.png"]
    name = names[rng.integers(len(names))]
    field = ["files", "file", "__proto__", ""][rng.integers(4)]
    part = f'--B\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\nContent-Type: {types[rng.integers(7)]}\r\n\r\n'
    form = bytearray(part.encode() + bytes(body) + b"\r\n--B--\r\n")
    if rng.random() < 0.3:
        form[rng.integers(len(form))] = rng.integers(256)
    return bytes(form), {"Content-Type": "multipart/form-data; boundary=B"}


def test_500_random_requests_never_fail_and_leave_no_file(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))  # a temporary file could not be made
    rng, statuses = np.random.default_rng(0), []
    with running(model, max_queue=500) as one:
        for seed in range(500):
            body, headers = fuzz_request(rng, seed)
            response = one.post(body, ["/predict", "/draw", "/predict?draw=1"][seed % 3], headers=headers)
            statuses.append(response.status_code)
            assert response.status_code == 200 or response.json()["error"]
    assert len(statuses) == 500
    assert max(statuses) < 500
    assert {200, 415, 422} <= set(statuses)
    assert list(tmp_path.iterdir()) == []


# ---- load


def test_200_requests_in_20_connections_are_answered_or_may_come_again(model, tmp_path):
    contents = [png(seed) for seed in range(200)]
    first = single_answer(model, tmp_path, contents[0])
    with running(model, max_queue=5) as one, ThreadPoolExecutor(20) as pool:
        one.gate.clear()
        pending = [pool.submit(one.post, content) for content in contents]
        until(lambda: one.state.metrics.by_status().get(429, 0) >= 14)  # one image runs, five wait, 14 of the first 20 are refused
        one.gate.set()
        responses = [future.result() for future in pending]
        until(lambda: sum(one.state.metrics.by_status().values()) == 200)  # a request is counted after its response
        counted = one.state.metrics.by_status()
    statuses = [response.status_code for response in responses]
    assert set(statuses) == {200, 429}
    assert counted == {200: statuses.count(200), 429: statuses.count(429)}
    for response in responses:
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
            assert "queue is full" in response.json()["error"]
        else:
            assert len(answer_of(response)["predictions"]) == 5
    if statuses[0] == 200:
        assert answer_of(responses[0]) == first


def test_the_bytes_of_all_bodies_together_are_bounded(model):
    """Each body is within its limit, four of them are not; those that were refused may come again, and nothing stays counted."""
    body = png(0) + bytes(300_000)  # what follows the image is not read
    with running(model, limit_mb=0.5, held_mb=1) as one, ThreadPoolExecutor(20) as pool:
        one.gate.clear()
        pending = [pool.submit(one.post, body) for _ in range(200)]
        until(lambda: one.state.metrics.by_status().get(429, 0) >= 17)
        assert 0 < one.state.held <= 1e6
        one.gate.set()
        responses = [future.result() for future in pending]
        until(lambda: one.state.held == 0)
        assert one.post(body).status_code == 200
    assert {response.status_code for response in responses} == {200, 429}
    for response in responses:
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
            assert "all together may take 1 MB" in response.json()["error"]


def test_bodies_without_a_length_count_as_they_arrive(model):
    def parts():
        yield png(0)
        for _ in range(4):
            yield bytes(100_000)

    with running(model, limit_mb=0.5, held_mb=0.1) as one, ThreadPoolExecutor(1) as pool:
        one.gate.clear()
        first = pool.submit(one.post, png(0) + bytes(300_000))
        assert one.entered.wait(60)
        second = one.post(parts())
        assert second.status_code == 429
        assert second.headers["retry-after"] == "1"
        one.gate.set()
        assert first.result().status_code == 200
        assert one.post(parts()).status_code == 200
        until(lambda: one.state.held == 0)


def test_a_refused_body_of_an_accepted_size_is_received_to_its_end(model):
    """The client reads its answer after it has sent everything, and uses the connection again."""
    body = png(0) + bytes(19_000_000)
    with running(model, held_mb=0.1) as one, ThreadPoolExecutor(1) as pool:
        one.gate.clear()
        first = pool.submit(one.post, png(1) + bytes(10_000_000))
        assert one.entered.wait(60)
        with socket.create_connection(one.address, timeout=60) as client:
            client.sendall(request_bytes(body))
            assert client.recv(65536).startswith(b"HTTP/1.1 429")
            one.gate.set()
            assert first.result().status_code == 200
            until(lambda: one.state.held == 0)
            client.sendall(request_bytes(png(0)))
            assert b"HTTP/1.1 200" in client.recv(65536)


def request_bytes(content):
    return b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(content) + content


def test_the_work_of_a_client_that_has_gone_is_dropped(model):
    with running(model) as one, ThreadPoolExecutor(1) as pool:
        one.gate.clear()
        kept = pool.submit(one.post, png(0))
        assert one.entered.wait(60)
        with socket.create_connection(one.address, timeout=60) as client:
            client.sendall(request_bytes(png(1)))
            until(lambda: one.state.worker.waiting == 1)
        until(lambda: one.state.metrics.by_status().get(499) == 1)
        one.gate.set()
        assert kept.result().status_code == 200
        until(lambda: one.state.worker.waiting == 0)
        text = one.get("/metrics").text
    assert "vitarium_images_total 1\n" in text
    assert "vitarium_dropped_total 1\n" in text


def test_slow_bodies_and_slow_heads(model, monkeypatch):
    monkeypatch.setattr("vitarium.serving.server.HEAD_SECONDS", 0.3)
    with running(model, body_timeout=0.2) as one:
        with socket.create_connection(one.address, timeout=60) as client:
            client.sendall(request_bytes(png(0))[:-10])
            assert client.recv(65536).startswith(b"HTTP/1.1 408")
            while client.recv(65536):  # the rest of the answer, and then the end: the body never came
                pass
        with socket.create_connection(one.address, timeout=60) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost:")
            assert client.recv(65536) == b""
        assert one.post(png(0)).status_code == 200


def test_an_answer_that_takes_too_long(model):
    with running(model, timeout=0.2) as one, ThreadPoolExecutor(1) as pool:
        one.gate.clear()
        late = pool.submit(one.post, png(0)).result()
        one.gate.set()
        assert late.status_code == 504
        assert "0.2 seconds" in late.json()["error"]
        assert one.post(png(0)).status_code == 200


def test_a_model_that_fails_is_an_error_whose_reason_is_in_the_log_alone(model, caplog):
    def fail(*_):
        raise RuntimeError("secret/path")

    with running(model) as one:
        handle = model.register_forward_pre_hook(fail)
        response = one.post(png(0))
        handle.remove()
        assert response.status_code == 500
        assert "secret" not in response.text
        assert "/predict failed: RuntimeError: secret/path" in caplog.text
        assert one.post(png(0)).status_code == 200


# ---- end


def test_a_server_that_stops_answers_what_runs(model):
    with running(model) as one, ThreadPoolExecutor(1) as pool:
        one.get("/healthz")
        one.gate.clear()
        last = pool.submit(one.post, png(0))
        assert one.entered.wait(60)
        one.state.stopping = True
        refused = one.get("/healthz")
        one.server.stop()
        one.gate.set()
        assert last.result().status_code == 200
        one.thread.join(60)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        with pytest.raises(httpx.TransportError):
            one.post(png(0))


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_the_command_prints_its_address_and_ends_at_sigterm(model, tmp_path):
    vitarium.save(model, tmp_path / "small.safetensors")
    command = [sys.executable, "-m", "vitarium", "serve", str(tmp_path / "small.safetensors"), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        assert "serves" in line
        url = line.split()[0]
        assert answer_of(httpx.post(f"{url}/predict", content=png(0), headers={"Content-Type": "image/png"}, timeout=60))
        process.terminate()  # the server waits for the request's end, and so for its count
        assert process.wait(60) == 0
        assert "1 with status 200" in process.stderr.read()
    finally:
        process.kill()


def test_a_taken_port_is_named_before_the_model_is_opened(served):
    with pytest.raises(UsageError, match="another program uses it"):
        vitarium.serve("missing.safetensors", port=served.address[1])
