"""The operator's endpoints: who may use them, what they take, and what they answer."""

from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry
from serve_fakes import ScriptedEngine, served, value
from starlette.testclient import TestClient

from cluster.metrics import GatewayMetrics
from cluster.serve.admin import AdminAccess
from cluster.serve.api import create_app
from cluster.serve.errors import unavailable
from router.controller import Progress

UNDER_WAY = Progress(4, {"starting": 2, "live": 2, "suspect": 0, "draining": 0}, 118, 0, 1.25)
EVERYONE = AdminAccess(is_open=True)
COMMANDS = [("scale", {"groups": 4}), ("rebalance", {}), ("drain", {"group": "0"})]


@dataclass
class Commands:
    """Implements ExpertCommands: notes what it is told, or fails as it is told."""

    error: Exception | None = None
    given: list[tuple[object, ...]] = field(default_factory=list)

    async def scale(self, model, num_groups):
        return self._note("scale", model, num_groups)

    async def rebalance(self, model):
        return self._note("rebalance", model)

    async def drain(self, model, group):
        return self._note("drain", model, group)

    def _note(self, *command):
        if self.error:
            raise self.error
        self.given.append(command)
        return UNDER_WAY


@pytest.fixture
def commands():
    return Commands()


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def client_of(commands, registry):
    """Return a function: a client of a server that lets in whom `access` does."""

    def build(access=EVERYONE, api_keys=frozenset()):
        app = create_app(
            {"echo": served(ScriptedEngine())},
            metrics=GatewayMetrics(registry),
            is_ready=None,
            status=None,
            api_keys=api_keys,
            experts=commands,
            admin_access=access,
        )
        return TestClient(app, base_url="http://127.0.0.1:8000")

    return build


@pytest.fixture
def http(client_of):
    return client_of()


def path(command, model="echo"):
    return f"/admin/models/{model}/experts/{command}"


def error_of(response, status):
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_command_that_is_taken_is_answered_with_how_far_it_is(http):
    response = http.post(path("scale"), json={"groups": 4})
    assert response.status_code == 202
    assert response.json() == {
        "wished_groups": 4,
        "groups": {"starting": 2, "live": 2, "suspect": 0, "draining": 0},
        "missing_replicas": 118,
        "lost_experts": 0,
        "imbalance": 1.25,
        "is_planned": True,
        "failure": None,
        "is_settled": False,
    }


@pytest.mark.parametrize(
    ("command", "body", "given"),
    [
        ("scale", {"groups": 4}, ("scale", "echo", 4)),
        ("rebalance", {}, ("rebalance", "echo")),
        ("drain", {"group": "echo/0"}, ("drain", "echo", "echo/0")),
        ("drain", {"group": "0"}, ("drain", "echo", "echo/0")),
    ],
)
def test_a_command_reaches_the_model_in_the_path(http, commands, command, body, given):
    assert http.post(path(command), json=body).status_code == 202
    assert commands.given == [given]


def test_a_rebalance_needs_no_body(http, commands):
    assert http.post(path("rebalance"), headers={"content-type": "application/json"}).status_code == 202
    assert commands.given == [("rebalance", "echo")]


@pytest.mark.parametrize(("command", "body"), COMMANDS)
def test_a_page_in_a_browser_cannot_give_commands_unasked(http, commands, command, body):
    # Without asking first, it can send any body, but not with this media type.
    error_of(http.post(path(command), json=body, headers={"content-type": "text/plain"}), 415)
    assert commands.given == []


@pytest.mark.parametrize(
    "host", ["tradewind.example:8000", "127.0.0.1.example", "192.0.2.1:8000", "", "[::2]:1"]
)
@pytest.mark.parametrize(("command", "body"), COMMANDS)
def test_a_page_whose_name_was_made_to_mean_this_machine_cannot_give_commands(
    http, commands, command, body, host
):
    error = error_of(http.post(path(command), json=body, headers={"host": host}), 403)
    assert "localhost" in error["message"]
    assert commands.given == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8000", "localhost:8000", "localhost", "[::1]:8000", "[::1]"]
)
def test_whoever_is_on_this_machine_can_give_commands(http, commands, host):
    assert http.post(path("rebalance"), json={}, headers={"host": host}).status_code == 202


def test_with_a_key_the_server_may_be_called_by_any_name(client_of):
    headers = {"authorization": "Bearer admin", "host": "tradewind.example"}
    http = client_of(AdminAccess(frozenset({"admin"})))
    assert http.post(path("rebalance"), json={}, headers=headers).status_code == 202


@pytest.mark.parametrize(("command", "body"), COMMANDS)
def test_a_model_that_is_not_served_is_named_with_those_that_are(http, command, body):
    error = error_of(http.post(path(command, "gpt"), json=body), 404)
    assert error["message"] == "model 'gpt' is not served here; there is 'echo'"


@pytest.mark.parametrize(
    ("command", "body", "param", "words"),
    [
        ("scale", b"{}", "groups", "groups: Field required"),
        ("scale", b"", "groups", "groups: Field required"),
        ("scale", b'{"groups": 0}', "groups", "groups is 0: Input should be greater than or equal to 1"),
        ("scale", b'{"groups": "4"}', "groups", "valid integer"),
        ("scale", b'{"groups": true}', "groups", "valid integer"),
        ("scale", b'{"groups": 4, "model": "x"}', "model", "Extra inputs are not permitted"),
        ("scale", b"[4]", None, "object"),
        ("scale", b"{", None, "Invalid JSON"),
        ("rebalance", b'{"now": true}', "now", "Extra inputs are not permitted"),
        ("drain", b'{"group": 0}', "group", "valid string"),
        ("drain", b'{"group": ""}', "group", "at least 1 character"),
    ],
)
def test_a_wrong_body_is_refused_with_one_that_is_right(http, commands, command, body, param, words):
    headers = {"content-type": "application/json"}
    error = error_of(http.post(path(command), content=body, headers=headers), 400)
    examples = {"scale": '{"groups": 4}', "rebalance": "{}", "drain": '{"group": "0"}'}
    assert error["param"] == param
    assert words in error["message"]
    assert error["message"].endswith(f"; the body should be like {examples[command]}")
    assert commands.given == []


@pytest.mark.parametrize(
    ("command", "body", "param"), [(*COMMANDS[0], "groups"), (*COMMANDS[1], None), (*COMMANDS[2], "group")]
)
def test_a_routers_refusal_is_the_clients_mistake(http, commands, command, body, param):
    commands.error = ValueError("groups is 1, but it takes 2")
    error = error_of(http.post(path(command), json=body), 400)
    assert (error["message"], error["param"]) == ("groups is 1, but it takes 2", param)


def test_a_router_that_does_not_answer_may_be_asked_again(http, commands):
    commands.error = unavailable("the router does not answer")
    response = http.post(path("rebalance"), json={})
    assert error_of(response, 503)["code"] == "service_unavailable"
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer inference", "Basic admin", "admin"])
@pytest.mark.parametrize(("command", "body"), COMMANDS)
def test_with_admin_keys_only_who_has_one_may(client_of, commands, command, body, header):
    http = client_of(AdminAccess(frozenset({"admin"})), api_keys=frozenset({"inference"}))
    headers = {} if header is None else {"authorization": header}
    error = error_of(http.post(path(command), json=body, headers=headers), 401)
    assert error["code"] == "invalid_api_key"
    assert "a valid admin key" in error["message"]
    assert commands.given == []


def test_an_admin_key_is_let_in(client_of, commands):
    http = client_of(AdminAccess(frozenset({"admin", "other"})))
    headers = {"authorization": "Bearer other"}
    assert http.post(path("scale"), json={"groups": 4}, headers=headers).status_code == 202
    assert commands.given


def test_an_admin_key_is_no_api_key(client_of):
    http = client_of(AdminAccess(frozenset({"admin"})), api_keys=frozenset({"inference"}))
    error_of(http.get("/v1/models", headers={"authorization": "Bearer admin"}), 401)


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer inference"}])
@pytest.mark.parametrize(("command", "body"), COMMANDS)
def test_without_admin_keys_a_public_server_says_which_setting_is_missing(
    client_of, commands, command, body, headers
):
    http = client_of(AdminAccess(), api_keys=frozenset({"inference"}))
    error = error_of(http.post(path(command), json=body, headers=headers), 403)
    assert "http.admin_keys_env" in error["message"]
    assert error["type"] == "permission_error"
    assert commands.given == []


def test_who_may_not_change_anything_does_not_learn_which_models_there_are(client_of):
    http = client_of(AdminAccess())
    error_of(http.post(path("scale", "gpt"), json={"groups": 4}), 403)


def test_commands_are_posted(http):
    error_of(http.get(path("scale")), 405)


def test_a_command_is_counted_under_its_model_and_route(http, registry):
    http.post(path("scale"), json={"groups": 4})
    labels = {"model": "echo", "endpoint": "/admin/models/{model}/experts/scale", "status": "202"}
    assert value(registry, "tradewind_gateway_requests_total", **labels) == 1
