"""The demo over HTTP: what a user of the OpenAI API sees, with experts in other processes."""

import asyncio
import json
import subprocess
import sys

import httpx
import openai
import psutil
import pytest

from cluster.actors import setup_worker
from tests.system.demo_deployment import MODEL, TRADEWIND, Deployment, wait_for

pytestmark = pytest.mark.system

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


def test_the_demo_knows_the_capital_of_france(deployment: Deployment) -> None:
    response = deployment.client().chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert response.choices[0].message.content == ANSWER
    assert response.choices[0].finish_reason == "stop"
    assert response.usage.completion_tokens == 8


def test_a_streamed_answer_is_the_whole_answer_in_pieces(deployment: Deployment) -> None:
    stream = deployment.client().chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == ANSWER
    assert sum(map(bool, pieces)) > 1
    assert chunks[-1].usage.completion_tokens == 8


@pytest.mark.parametrize("given", [{}, {"x-request-id": "mine"}])
def test_an_answer_has_one_request_id(deployment: Deployment, given: dict[str, str]) -> None:
    response = httpx.get(f"{deployment.url}/v1/models", headers=given)
    (request_id,) = response.headers.get_list("x-request-id")
    assert request_id == given.get("x-request-id", request_id)


def test_32_clients_at_once_get_what_each_gets_alone(deployment: Deployment) -> None:
    def ask(client: openai.AsyncOpenAI, index: int):
        # Greedy and sampled, short and long, sharing prefixes and not.
        return client.chat.completions.create(
            model=MODEL,
            messages=[
                {
                    "role": "user",
                    "content": f"Tell me about the number {index}. " + "Be brief. " * (index * 3),
                }
            ],
            temperature=0 if index % 2 else 0.8,
            seed=index,
            max_tokens=24,
        )

    async def together() -> list[str]:
        async with deployment.async_client() as client:
            responses = await asyncio.gather(*(ask(client, index) for index in range(32)))
            return [response.choices[0].message.content for response in responses]

    async def alone() -> list[str]:
        async with deployment.async_client() as client:
            return [(await ask(client, index)).choices[0].message.content for index in range(0, 32, 5)]

    answers = asyncio.run(together())
    assert asyncio.run(alone()) == answers[::5]


def test_the_choices_of_one_request_are_generated_together(deployment: Deployment) -> None:
    num_choices, num_tokens = 12, 24
    chunks = deployment.client().completions.create(
        model=MODEL,
        prompt=[f"{index} is a number that" for index in range(num_choices)],
        max_tokens=num_tokens,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    begun: set[int] = set()
    for chunk in chunks:
        (choice,) = chunk.choices
        begun.add(choice.index)
        if choice.finish_reason:
            break
    assert begun == set(range(num_choices)), "the others had to wait"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_request(deployment: Deployment, stream: bool) -> None:
    deployment.wait_until_idle()
    body = {"model": MODEL, "messages": QUESTION, "ignore_eos": True, "max_tokens": 8000, "stream": stream}
    with httpx.Client(base_url=deployment.url, timeout=30) as client:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()  # kept: httpx closes a connection whose iterator is dropped
                next(lines)
                wait_for(lambda: deployment.engine()["num_running"] == 1, "the running request")
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json=body, timeout=3)
    # 8,000 tokens would take minutes.
    deployment.wait_until_idle()
    assert deployment.engine()["used_blocks"] == 0


def test_an_operator_finds_every_process_by_its_title(deployment: Deployment) -> None:
    status = deployment.status()
    (model,) = status["models"]
    processes = [status["gateway"], model["router"]]
    processes += [report["process"] for report in model["engines"] + model["groups"]]
    kinds = sorted(process["kind"] for process in processes)
    assert kinds == ["Engine", "ExpertGroup", "ExpertGroup", "Gateway", "Router"]
    for process in processes:
        title = " ".join(psutil.Process(process["pid"]).cmdline())
        assert process["kind"] in title, f"{process} is called {title!r}"


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_workers_are_started_by_our_program_and_forked_by_our_server(deployment: Deployment) -> None:
    family = psutil.Process(deployment.process.pid).children(recursive=True)
    (raylet,) = (process for process in family if process.name() == "raylet")
    assert setup_worker.__file__ in " ".join(raylet.cmdline())
    (model,) = deployment.status()["models"]
    workers = [report["process"]["pid"] for report in model["engines"] + model["groups"]]
    servers = {psutil.Process(pid).ppid() for pid in workers}
    (server,) = (process for process in family if {process.pid} == servers)
    assert "cluster.actors.fork_server" in server.cmdline()


def test_every_expert_is_in_both_groups_and_gets_rows(deployment: Deployment) -> None:
    deployment.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Count to one hundred. " * 10}], max_tokens=8
    )
    wait_for(
        lambda: deployment.status()["models"][0]["progress"]["is_settled"], "a second replica of each expert"
    )
    (model,) = deployment.status()["models"]
    assert model["epoch"] >= 1
    assert [sorted(group["experts"]) for group in model["groups"]] == [list("01234567")] * 2
    assert all(rows > 0 for group in model["groups"] for rows in group["rows"].values())


def test_metrics_cover_gateway_engine_and_experts(deployment: Deployment) -> None:
    deployment.client().chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=4)
    wait_for(lambda: "tradewind_expert_rows_total{" in _metrics(deployment), "rows per expert in /metrics")
    text = _metrics(deployment)
    for name in (
        "tradewind_gateway_requests_total",
        "tradewind_gateway_prompt_tokens_total",
        "tradewind_gateway_generated_tokens_total",
        "tradewind_gateway_time_to_first_token_seconds_count",
        "tradewind_gateway_inter_token_latency_seconds_count",
        "tradewind_engine_requests_waiting",
        "tradewind_engine_kv_blocks_used",
        "tradewind_engine_time_to_first_token_seconds_sum",
        "tradewind_failovers_total",
        "tradewind_rows_resent_total",
        "tradewind_requests_replayed_total",
        "tradewind_placement_epoch",
        "tradewind_expert_imbalance",
        "tradewind_expert_groups",
        "tradewind_rebalance_bytes_total",
        "tradewind_rebalance_seconds_count",
    ):
        assert f"{name}{{" in text, f"{name} is missing in /metrics"


def _metrics(deployment: Deployment) -> str:
    return httpx.get(f"{deployment.url}/metrics", timeout=30).raise_for_status().text


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"model": "gpt-5"}, 404, "model", ["gpt-5", MODEL]),
        ({"messages": []}, 400, "messages", ["messages"]),
        ({"messages": [{"role": "user", "content": "long " * 9000}]}, 400, "messages", ["8192"]),
        ({"max_tokens": 0}, 400, "max_tokens", ["0", "1"]),
        ({"max_tokens": 100_000}, 400, "max_tokens", ["100000", "8192"]),
        ({"temperature": 2.5}, 400, "temperature", ["2.5", "2"]),
        ({"temperature": "hot"}, 400, "temperature", ["hot"]),
        ({"top_p": 0}, 400, "top_p", ["0"]),
        ({"tempreature": 1}, 400, "tempreature", ["tempreature"]),
    ],
)
def test_a_bad_request_names_field_value_and_limit(
    deployment: Deployment, change, status, param, words
) -> None:
    body = {"model": MODEL, "messages": QUESTION, **change}
    response = httpx.post(f"{deployment.url}/v1/chat/completions", json=body, timeout=30)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert error["param"] == param
    for word in words:
        assert word in error["message"]


def test_malformed_json_is_a_400_with_an_error_body(deployment: Deployment) -> None:
    response = httpx.post(
        f"{deployment.url}/v1/chat/completions",
        content=b'{"model": ',
        headers={"content-type": "application/json"},
        timeout=30,
    )
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_completions_take_text_and_token_ids(deployment: Deployment) -> None:
    client = deployment.client()
    ids = [504, 3575, 282, 4649, 314]  # "The capital of France is"
    text = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=6
    )
    tokens = client.completions.create(model=MODEL, prompt=ids, temperature=0, max_tokens=6)
    assert text.usage.prompt_tokens == len(ids)
    assert tokens.choices[0].text == text.choices[0].text != ""


def test_status_prints_json_and_a_table(deployment: Deployment) -> None:
    command = [TRADEWIND, "status", "--url", deployment.url]
    as_json = subprocess.run([*command, "--json"], capture_output=True, check=True, timeout=60).stdout
    assert json.loads(as_json)["models"][0]["model"] == MODEL
    table = subprocess.run(command, capture_output=True, check=True, timeout=60, text=True).stdout
    assert all(kind in table for kind in ("Gateway", "Engine", "ExpertGroup", "Router"))


def test_chat_answers_in_the_terminal(deployment: Deployment) -> None:
    command = [TRADEWIND, "chat", "--url", deployment.url]
    question = QUESTION[0]["content"] + "\n"
    done = subprocess.run(command, input=question, capture_output=True, check=True, timeout=120, text=True)
    assert ANSWER in done.stdout
