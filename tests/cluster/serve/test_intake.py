"""A gateway that is to end: it takes nobody in any more, and sees the answers that run to their end."""

import asyncio

import pytest
from starlette.responses import PlainTextResponse

from cluster.serve.intake import Intake


class Call:
    """One HTTP request to an app that answers when it is told to; `answer` is what it was sent."""

    def __init__(self, app, path="/v1/completions"):
        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        self.answer = []
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self):
        return {"type": "http.request", "body": b"", "more_body": False}

    async def _send(self, message):
        self.answer.append(message)

    @property
    def status(self):
        return self.answer[0]["status"]


@pytest.fixture
def go_on():
    return asyncio.Event()


@pytest.fixture
def intake():
    return Intake()


@pytest.fixture
def app(intake, go_on):
    async def slow(scope, receive, send):
        await go_on.wait()
        await PlainTextResponse("done")(scope, receive, send)

    return intake.before(slow)


async def settle():
    """Let every task run until it waits for something outside."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_closing_waits_for_every_answer_that_runs(app, intake, go_on):
    async def run():
        calls = [Call(app), Call(app)]
        await settle()
        closing = asyncio.ensure_future(intake.close())
        await settle()
        assert not closing.done()
        go_on.set()
        await asyncio.wait_for(closing, 5)
        assert [call.status for call in calls] == [200, 200]

    asyncio.run(run())


def test_a_client_that_leaves_is_not_waited_for(app, intake):
    async def run():
        call = Call(app)
        await settle()
        call.task.cancel()
        await asyncio.wait_for(intake.close(), 5)

    asyncio.run(run())


def test_an_idle_gateway_is_closed_at_once(intake):
    asyncio.run(asyncio.wait_for(intake.close(), 5))


def test_who_comes_after_the_closing_is_told_to_come_again(app, intake):
    async def run():
        await intake.close()
        call = Call(app)
        await asyncio.wait_for(call.task, 5)
        assert call.status == 503
        assert (b"retry-after", b"1") in call.answer[0]["headers"]

    asyncio.run(run())


def test_operators_are_answered_and_not_waited_for(app, intake, go_on):
    async def run():
        before = Call(app, "/status")
        await asyncio.wait_for(intake.close(), 5)
        after = Call(app, "/metrics")
        go_on.set()
        await asyncio.wait_for(asyncio.gather(before.task, after.task), 5)
        assert before.status == after.status == 200

    asyncio.run(run())
