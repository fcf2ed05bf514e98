"""Access: token, origin, names of the host, headers, the page, and what is refused before a server starts."""

import base64
import hashlib
import re

import pytest

import vitarium
from tests.serving.conftest import png, running
from vitarium.errors import UsageError
from vitarium.serving.metrics import Histogram
from vitarium.verbs.serve import create_app


@pytest.fixture(scope="module")
def served(model):
    with running(model, name="/home/somebody/flowers.safetensors") as one:
        yield one


def test_info_names_the_model_and_no_folder(served):
    info = served.get("/info").json()
    assert info["model"] == "flowers.safetensors"
    assert info["architecture"] == "swin_pico"
    assert info["task"] == "classify"
    assert info["labels"] == served.state.model.labels
    assert info["preprocessing"]["image_size"] == 16
    assert info["limits"]["max_queue"] == 64
    assert served.get("/healthz").json() == {"ready": True}


def test_every_response_has_the_headers_of_security_and_none_opens_it_to_other_sites(served):
    for path in ("/", "/info", "/missing", "/openapi.json"):
        headers = served.get(path, headers={"Origin": served.url}).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


def test_pages_of_other_sites_are_refused(served):
    assert served.post(png(0), headers={"Origin": "https://evil.example"}).status_code == 403
    assert served.post(png(0), headers={"Origin": "null"}).status_code == 403
    assert served.post(png(0), headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert served.post(png(0), headers={"Host": "rebound.example"}).status_code == 403
    assert served.post(png(0), headers={"Host": "localhost:80", "Origin": "http://localhost:80"}).status_code == 200
    assert served.post(png(0), headers={"Host": "[::1]:80"}).status_code == 200


def test_a_token_is_needed_for_all_but_the_page_and_the_check(model):
    with running(model, token="s3cret") as one:
        for path, status in (("/", 200), ("/healthz", 200), ("/info", 401), ("/metrics", 401), ("/openapi.json", 401)):
            assert one.get(path).status_code == status
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": "Bearer s3cret2"}):
            response = one.post(png(0), headers=given)
            assert response.status_code == 401
            assert "Bearer" in response.json()["error"]
        assert one.post(png(0), headers={"Authorization": "Bearer s3cret", "Host": "any.example"}).status_code == 200


def test_the_page_is_one_file_whose_scripts_the_policy_names(served):
    response = served.get("/")
    html, policy = response.text, response.headers["content-security-policy"]
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        allowed = re.search(rf"{directive} ([^;]+)", policy)[1]
        contents = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        assert contents
        for text in contents:
            assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in allowed
        assert "unsafe" not in allowed
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", html)
    assert "innerHTML" not in html
    assert "<meta http-equiv" not in html
    assert not re.findall(r"\son\w+=", html)  # handlers in attributes would need a weaker policy


def test_no_documentation_page_loads_scripts_from_elsewhere(served):
    for path in ("/docs", "/redoc"):
        response = served.get(path)
        assert response.status_code == 404
        assert "/predict" in response.json()["error"]
    paths = served.get("/openapi.json").json()["paths"]
    assert "multipart/form-data" in paths["/predict"]["post"]["requestBody"]["content"]
    assert served.get("/predict").status_code == 405


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_queue": 0}, "max_queue must be at least 1"),
        ({"limit_mb": 0}, "limit_mb must be above 0"),
        ({"timeout": float("nan")}, "timeout must be above 0"),
        ({"top_k": 5000}, "top_k must be at most 1000"),
        ({"queue": 3}, "unknown limits: queue"),
        ({"token": "two words"}, "token must be ASCII text without spaces"),
        ({"token": ""}, "token must be"),
    ],
)
def test_wrong_limits_are_named(model, limits, reason):
    with pytest.raises(UsageError, match=reason):
        create_app(model, **limits)


def test_models_that_cannot_answer_are_refused():
    with pytest.raises(UsageError, match="no answer for a single image"):
        create_app(vitarium.create_model("dcgan_pico"))
    broken = vitarium.create_model("swin_pico", num_classes=3)
    broken.get_classifier().weight.data.fill_(float("nan"))
    with pytest.raises(UsageError, match="not finite"):
        create_app(broken)


@pytest.mark.parametrize(("host", "port", "reason"), [("no.such.host.invalid", 0, "host must be"), ("127.0.0.1", 70_000, "port must be")])
def test_wrong_addresses_are_named(host, port, reason):
    with pytest.raises(UsageError, match=reason):
        vitarium.serve("model.safetensors", host=host, port=port)


def test_a_histogram_counts_up_to_each_bound():
    one = Histogram((1, 2.5))
    for value in (0.5, 1, 2, 7):
        one.add(value)
    assert list(one.lines("x")) == ['x_bucket{le="1"} 2', 'x_bucket{le="2.5"} 3', 'x_bucket{le="+Inf"} 4', "x_sum 10.500000", "x_count 4"]
