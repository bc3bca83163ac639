"""The HTTP surface around the answers: errors, keys, models, and what operators read."""

import logging
import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry
from serve_fakes import CONTEXT_LENGTH, ScriptedEngine, served, value
from starlette.testclient import TestClient

from cluster.metrics import GatewayMetrics
from cluster.serve.api import create_app
from cluster.serve.connection import MAX_BODY_BYTES
from cluster.serve.engine_client import EngineLost

HI = {"model": "echo", "messages": [{"role": "user", "content": "Hi"}]}


def build(engine=None, **changes):
    async def ready():
        return True

    async def status():
        return {}

    arguments = {
        "metrics": GatewayMetrics(CollectorRegistry()),
        "is_ready": ready,
        "status": status,
        **changes,
    }
    return create_app({"echo": served(engine or ScriptedEngine())}, **arguments)


def error_of(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req-")
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_route_that_is_not_there_has_openais_error_body(http):
    assert error_of(http.get("/v2/what"), 404)["message"] == "there is no /v2/what"


def test_a_method_that_is_not_there_has_openais_error_body(http):
    assert error_of(http.get("/v1/completions"), 405)["type"] == "invalid_request_error"


def test_a_path_with_a_slash_too_many_is_not_redirected(http):
    error_of(http.post("/v1/completions/", json={}), 404)


def test_malformed_json_is_refused(http):
    response = http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert "not valid JSON" in error_of(response, 400)["message"]


def test_another_media_type_is_refused(http):
    response = http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert "application/json" in error_of(response, 415)["message"]


def test_fastapis_own_validation_errors_have_openais_error_body():
    app = build()

    @app.get("/number/{number}")
    async def number(number: int):
        return number

    with TestClient(app) as http:
        assert error_of(http.get("/number/x"), 400)["param"] == "number"


def test_a_model_that_is_not_served_is_named_with_those_that_are(http):
    error = error_of(http.post("/v1/chat/completions", json={**HI, "model": "gpt"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert error["message"] == "model 'gpt' is not served here; there is 'base', 'echo'"


def test_an_announced_body_that_is_too_large_is_refused_unread(http, engine):
    headers = {"content-type": "application/json", "content-length": str(MAX_BODY_BYTES + 1)}
    error_of(http.post("/v1/chat/completions", content=iter([b"{}"]), headers=headers), 413)


def test_a_body_that_grows_too_large_is_refused(http):
    parts = iter([b" " * 2**20] * (MAX_BODY_BYTES // 2**20 + 1))
    headers = {"content-type": "application/json"}
    error_of(http.post("/v1/chat/completions", content=parts, headers=headers), 413)


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        (
            "/v1/completions",
            {"model": "echo", "prompt": "x" * 200},
            "prompt",
            "the prompt has 200 tokens, but echo's context is 200 tokens",
        ),
        ("/v1/completions", {"model": "echo", "prompt": ["x", ""]}, "prompt", "no tokens"),
        (
            "/v1/completions",
            {"model": "echo", "prompt": [300]},
            "prompt",
            "token 300, but the ids go from 0 to 256",
        ),
        (
            "/v1/completions",
            {"model": "echo", "prompt": "x", "max_tokens": 200},
            "max_tokens",
            "so 199 are left",
        ),
        ("/v1/chat/completions", {**HI, "max_tokens": 200}, "max_tokens", "so 184 are left"),
        (
            "/v1/chat/completions",
            {**HI, "max_completion_tokens": 200},
            "max_completion_tokens",
            "max_completion_",
        ),
        ("/v1/chat/completions", {**HI, "model": "base"}, "model", "no chat template; use /v1/completions"),
        (
            "/v1/chat/completions",
            {**HI, "messages": [{"role": "user", "content": "refuse"}]},
            "messages",
            "no such talk",
        ),
        (
            "/v1/chat/completions",
            {**HI, "messages": [{"role": "user", "content": "x" * CONTEXT_LENGTH}]},
            "messages",
            "the prompt has 214 tokens",
        ),
        ("/v1/chat/completions", {**HI, "messages": []}, "messages", "at least 1 item"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_any_engine_work(
    http, engine, path, fields, param, words
):
    error = error_of(http.post(path, json=fields), 400)
    assert (error["param"], words in error["message"]) == (param, True), error
    assert engine.submissions == []


def test_a_request_that_has_a_name_is_called_by_it_and_named_by_whoever_did(http, engine, caplog):
    engine.failures = [(0, ZeroDivisionError())]
    with caplog.at_level(logging.ERROR):
        response = http.post("/v1/chat/completions", json=HI, headers={"x-request-id": "mine"})
    assert "mine failed" in caplog.text
    assert response.json()["error"]["message"].endswith("under mine")
    assert "x-request-id" not in response.headers, "Serve adds it"


def test_an_unexpected_error_shows_no_internals_and_is_logged_under_its_id(http, engine, caplog):
    engine.failures = [(0, ZeroDivisionError("secret of /etc/passwd"))]
    with caplog.at_level(logging.ERROR):
        response = http.post("/v1/chat/completions", json=HI)
    error = error_of(response, 500)
    assert "secret" not in response.text
    assert response.headers["x-request-id"] in error["message"]
    assert response.headers["x-request-id"] in caplog.text
    assert "secret of /etc/passwd" in caplog.text


def test_an_unexpected_error_in_mid_stream_shows_no_internals(http, engine):
    engine.failures = [(2, ZeroDivisionError("secret"))]
    lines = http.post("/v1/chat/completions", json={**HI, "stream": True}).text.strip().split("\n\n")
    assert "internal error" in lines[-1]
    assert "secret" not in lines[-1]


def test_a_stream_ends_with_done(http):
    response = http.post("/v1/chat/completions", json={**HI, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert all(line.startswith("data: ") for line in response.text.strip().split("\n\n"))
    assert response.text.endswith("data: [DONE]\n\n")


def test_models_are_listed_and_described(client):
    assert [model.id for model in client.models.list()] == ["echo", "base"]
    model = client.models.retrieve("echo")
    assert (model.id, model.object, model.created) == ("echo", "model", 1_700_000_000)


def test_a_model_name_may_have_a_slash():
    model = served(ScriptedEngine(), "mistralai/tiny")
    app = create_app(
        {model.name: model}, metrics=GatewayMetrics(CollectorRegistry()), is_ready=None, status=None
    )
    with TestClient(app) as http:
        assert http.get("/v1/models/mistralai/tiny").json()["id"] == "mistralai/tiny"


def test_health_follows_the_callable():
    answers = [True, False]

    async def ready():
        return answers.pop(0)

    with TestClient(build(is_ready=ready)) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert error_of(http.get("/health"), 503)["code"] == "service_unavailable"


def test_status_is_the_callables_answer(http):
    assert http.get("/status").json() == {"models": ["echo"]}


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer ", "Bearer", "key", "Basic key", "Bearer kéy"]
)
def test_with_api_keys_the_api_asks_for_one(header):
    headers = {} if header is None else {"authorization": header.encode()}
    with TestClient(build(api_keys=frozenset({"key", "other"}))) as http:
        assert error_of(http.get("/v1/models", headers=headers), 401)["code"] == "invalid_api_key"
        error_of(http.post("/v1/chat/completions", json=HI, headers=headers), 401)


def test_a_known_api_key_opens_the_api():
    with TestClient(build(api_keys=frozenset({"key", "other"}))) as http:
        assert http.get("/v1/models", headers={"authorization": "Bearer other"}).status_code == 200


def test_health_and_metrics_need_no_api_key():
    with TestClient(build(api_keys=frozenset({"key"}), expose=lambda: b"")) as http:
        assert http.get("/health").status_code == 200
        assert http.get("/metrics").status_code == 200


def test_an_answered_request_moves_the_metrics(http, engine, registry):
    engine.failures = [(3, EngineLost("gone"))]
    http.post("/v1/chat/completions", json=HI)
    exposed = http.get("/metrics").text
    assert 'tradewind_gateway_generated_tokens_total{model="echo"} 13.0' in exposed
    assert 'tradewind_gateway_prompt_tokens_total{model="echo"} 16.0' in exposed
    assert 'tradewind_requests_replayed_total{model="echo"} 1.0' in exposed
    assert 'tradewind_gateway_time_to_first_token_seconds_count{model="echo"} 1.0' in exposed
    assert 'tradewind_gateway_inter_token_latency_seconds_count{model="echo"} 12.0' in exposed
    assert 'tradewind_gateway_requests_in_flight{model="echo"} 0.0' in exposed
    answered = {"model": "echo", "endpoint": "/v1/chat/completions", "status": "200"}
    assert value(registry, "tradewind_gateway_requests_total", **answered) == 1


def test_a_stream_that_fails_counts_under_its_error(http, engine, registry):
    engine.failures = [(2, ZeroDivisionError())]
    assert http.post("/v1/chat/completions", json={**HI, "stream": True}).status_code == 200
    failed = {"model": "echo", "endpoint": "/v1/chat/completions", "status": "500"}
    assert value(registry, "tradewind_gateway_requests_total", **failed) == 1


def test_a_client_cannot_invent_metric_labels(http, registry):
    http.post("/v1/chat/completions", json={**HI, "model": "made-up"})
    http.get("/made/up")
    assert b"made" not in http.get("/metrics").content


def test_a_server_that_was_given_no_commands_has_no_admin_endpoints(http):
    response = http.post("/admin/models/echo/experts/rebalance", json={})
    assert error_of(response, 404)["message"] == "there is no /admin/models/echo/experts/rebalance"


def test_the_api_needs_no_torch():
    code = "import sys, cluster.serve.api; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
