import io
import json

import pytest
from rich.console import Console

from cluster.terminal.chat import Chat
from tests.cluster.terminal.http_endpoint import HttpEndpoint, QuietHandler

pytestmark = pytest.mark.timeout(60)


class Endpoint(HttpEndpoint):
    """A real HTTP server with two models; it answers each question with the next of `answers`."""

    def __init__(self):
        self.answers = []  # (status, body, media type)
        self.asked = []  # the bodies of the questions
        endpoint = self

        class Handler(QuietHandler):
            def do_GET(self):
                models = {"data": [{"id": "echo"}, {"id": "other"}]}
                self.reply(200, json.dumps(models))

            def do_POST(self):
                assert self.path == "/v1/chat/completions"
                endpoint.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self.reply(*endpoint.answers.pop(0))

        super().__init__(Handler)

    def answers_with(self, *pieces):
        chunks = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        chunks += [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
        chunks += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": {}}]
        self.streams([*map(json.dumps, chunks), "[DONE]"])

    def streams(self, events):
        body = "".join(f"data: {event}\n\n" for event in events)
        self.answers.append((200, body, "text/event-stream"))

    def fails_with(self, status, body, media_type="application/json"):
        self.answers.append((status, body, media_type))


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture
def talk(endpoint, monkeypatch):
    """Return a function that types lines, then Ctrl-D, and returns what is shown."""

    def run(*lines, model=None, system=None, temperature=0.0):
        typed = iter(lines)

        def read(prompt):
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        console = Console(file=io.StringIO(), width=200, highlight=False)
        Chat(endpoint.url, model, system, temperature, None, console).run()
        return console.file.getvalue()

    return run


def test_an_answer_is_shown_whole(endpoint, talk):
    endpoint.answers_with("The capital", " of France", " is [bold]Paris[/].")
    assert "The capital of France is [bold]Paris[/].\n" in talk("What is the capital of France?")


def test_a_question_asks_the_first_model_for_a_stream(endpoint, talk):
    endpoint.answers_with("Hello")
    talk("Hi", temperature=0.5)
    question = [{"role": "user", "content": "Hi"}]
    assert endpoint.asked == [{"model": "echo", "messages": question, "temperature": 0.5, "stream": True}]


def test_a_model_may_be_chosen(endpoint, talk):
    endpoint.answers_with("Hello")
    talk("Hi", model="other")
    assert endpoint.asked[0]["model"] == "other"


def test_a_model_that_is_not_served_is_refused_with_those_that_are(endpoint, talk):
    with pytest.raises(
        ValueError, match=f"'third' is not served at {endpoint.url}; choose one of echo, other"
    ):
        talk(model="third")


def test_the_conversation_goes_along_with_the_next_question(endpoint, talk):
    endpoint.answers_with("Hel", "lo")
    endpoint.answers_with("Bye")
    talk("Hi", "  ", "Leave", system="Be brief.")
    assert endpoint.asked[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Leave"},
    ]


def test_an_error_is_shown_and_its_question_forgotten(endpoint, talk):
    endpoint.fails_with(400, json.dumps({"error": {"message": "messages[0] is [/wrong]"}}))
    endpoint.answers_with("Hello")
    assert "messages[0] is [/wrong]\n" in talk("Hmm", "Hi")
    assert endpoint.asked[1]["messages"] == [{"role": "user", "content": "Hi"}]


def test_an_error_in_mid_stream_is_shown_behind_what_came(endpoint, talk):
    begun = json.dumps({"choices": [{"delta": {"content": "Once"}}]})
    endpoint.streams([begun, json.dumps({"error": {"message": "the engine was lost"}})])
    endpoint.answers_with("Hello")
    assert "Once\nthe engine was lost\n" in talk("Tell", "Hi")
    assert len(endpoint.asked[1]["messages"]) == 1


def test_a_stream_that_ends_without_done_is_called_broken_off(endpoint, talk):
    endpoint.streams([json.dumps({"choices": [{"delta": {"content": "Once"}}]})])
    endpoint.answers_with("Hello")
    assert "Once\nthe answer broke off: its stream ended without [DONE]\n" in talk("Tell", "Hi")
    assert len(endpoint.asked[1]["messages"]) == 1


@pytest.mark.parametrize("body", ["<html>No server is available</html>", "[]", '{"error": "gone"}', ""])
def test_an_error_of_a_proxy_is_shown_by_its_status(endpoint, talk, body):
    endpoint.fails_with(503, body, "text/html")
    endpoint.answers_with("Hello")
    shown = talk("Hmm", "Hi")
    assert "503 Service Unavailable\n" in shown
    assert "Hello\n" in shown
