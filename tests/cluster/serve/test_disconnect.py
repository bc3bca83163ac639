"""A client that leaves, over a real socket."""

import json
import socket
import threading
from contextlib import contextmanager

import openai
import pytest
import uvicorn
from serve_fakes import value

TIMEOUT_S = 10


@contextmanager
def live(app):
    """Serve `app` and yield its address; leaving waits until every request has been dealt with."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def post(address, **fields):
    body = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "Hi"}], **fields}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    connection = socket.create_connection(address, TIMEOUT_S)
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    return connection


@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 4])
def test_a_client_that_leaves_aborts_its_request_at_once(
    app, engine, registry, stream, num_tokens, num_choices
):
    engine.hang_after = num_tokens
    with live(app) as address:
        connection = post(address, stream=stream, n=num_choices)
        for _ in range(num_choices):
            assert engine.hanging.acquire(timeout=TIMEOUT_S)
        connection.close()
        for _ in range(num_choices):
            assert engine.aborted.acquire(timeout=TIMEOUT_S)
    counted = {"model": "echo", "endpoint": "/v1/chat/completions", "status": "499"}
    assert value(registry, "tradewind_gateway_requests_total", **counted) == 1
    assert value(registry, "tradewind_gateway_requests_in_flight", model="echo") == 0


def test_tokens_arrive_before_the_answer_is_complete_and_closing_the_stream_aborts_it(app, engine):
    engine.hang_after = 3
    with live(app) as (host, port):
        client = openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", timeout=TIMEOUT_S)
        with (
            client,
            client.chat.completions.create(
                model="echo", messages=[{"role": "user", "content": "Hi"}], stream=True
            ) as stream,
        ):
            text = ""
            while text != "Hel":
                text += next(stream).choices[0].delta.content
        assert engine.aborted.acquire(timeout=TIMEOUT_S)


def test_a_client_that_stays_aborts_nothing(app, engine):
    with live(app) as (host, port):
        client = openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", timeout=TIMEOUT_S)
        with client:
            client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "Hi"}])
    assert not engine.aborted.acquire(blocking=False)
