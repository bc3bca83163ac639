"""What does the HTTP path add to the engine's time to first token, for one client on an idle deployment?

    make serve                                             # in one terminal
    .venv/bin/python bench/http_overhead.py                # in another
    .venv/bin/python bench/http_overhead.py --json out.json

Both sides are of the same requests: the client's clock from sending the request to the first streamed token,
and the engine's own clock from the arrival of the request there to its first token (the growth of
`tradewind_engine_time_to_first_token_seconds_sum` in /metrics, read around each request). The difference is
all that lies around the engine: HTTP, HAProxy, checks, the template, tokenizing, the Serve call, the token
link, detokenizing and SSE. Each prompt differs, but all begin with the template's 26 tokens, of which the
prefix cache gives back one block of 16.
"""

import argparse
import json
import re
import statistics
import time
from pathlib import Path

import httpx
from about import describe_run

METRIC = "tradewind_engine_time_to_first_token_seconds_sum"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what HTTP adds to the time to first token.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()

    about = describe_run()
    with httpx.Client(base_url=arguments.url, timeout=60) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        for index in range(5):  # warm up: connections, imports, caches
            measure(client, model, f"warm {index}")
        pairs = [measure(client, model, f"Question {index}") for index in range(arguments.requests)]
    over_http = [client_s for client_s, _ in pairs]
    in_engine = [engine_s for _, engine_s in pairs]
    added = [client_s - engine_s for client_s, engine_s in pairs]
    table = {
        "over HTTP": over_http,
        "in the engine": in_engine,
        "added by HTTP": added,
    }
    print(f"\ntime to first token of {model}, ms, {len(pairs)} requests, one at a time")
    print(f"{'':16}{'median':>9}{'p90':>9}{'max':>9}")
    results = {}
    for name, seconds in table.items():
        numbers = statistics.median(seconds), statistics.quantiles(seconds, n=10)[-1], max(seconds)
        print(f"{name:16}" + "".join(f"{1e3 * number:9.2f}" for number in numbers))
        results[name] = dict(zip(("median_s", "p90_s", "max_s"), numbers, strict=True))
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "model": model, **results}, indent=1))


def measure(client: httpx.Client, model: str, question: str) -> tuple[float, float]:
    """Return one request's seconds to its first token: at the client, and in the engine."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 4,
        "temperature": 0,
        "stream": True,
    }
    before_s = engine_seconds(client)
    started_at = time.perf_counter()
    first_at = None
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if first_at is None and line.startswith("data: {") and '"content": ""' not in line:
                first_at = time.perf_counter()
    assert first_at is not None, "the answer held no token"
    return first_at - started_at, engine_seconds(client) - before_s


def engine_seconds(client: httpx.Client) -> float:
    """Return the engines' time to first token, summed over all requests so far."""
    text = client.get("/metrics").raise_for_status().text
    return sum(float(value) for value in re.findall(rf"^{METRIC}{{.*}} (\S+)$", text, re.MULTILINE))


if __name__ == "__main__":
    main()
