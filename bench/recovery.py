"""What does a stream notice when a process of the deployment is killed?

    make serve                                        # in one terminal
    .venv/bin/python bench/recovery.py                # in another, on the same machine
    .venv/bin/python bench/recovery.py --json out.json

One seeded stream is answered undisturbed, then again while a process of each kind is killed (SIGKILL).
Printed are the longest gap between two chunks of each, and whether the answer is the undisturbed one.
"""

import argparse
import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import httpx
from about import describe_run

KILL_AFTER = 15  # chunks
NUM_TOKENS = 60
QUESTION = "Tell me a long story about a fox."


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a stream notices of a killed process.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()

    about = describe_run()
    print(f"\n{'killed':14}{'longest gap, s':>16}{'same answer':>14}")
    results = []
    with httpx.Client(base_url=arguments.url, timeout=180) as client:
        undisturbed, gap_s = stream(client, None)
        for victim in ["nothing", *["expert group", "router", "engine"] * arguments.repeat]:
            pid = None if victim == "nothing" else find(client, victim)
            answer, gap_s = stream(client, pid)
            results.append({"killed": victim, "gap_s": gap_s, "same": answer == undisturbed})
            print(f"{victim:14}{gap_s:16.2f}{answer == undisturbed!s:>14}", flush=True)
            if pid is not None:
                wait_for_another(client, victim, pid)
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "results": results}, indent=1))


def stream(client: httpx.Client, victim: int | None) -> tuple[str, float]:
    """Ask, and kill `victim` in the middle; return the answer and the longest gap of chunks in seconds."""
    body = {
        "model": client.get("/v1/models").raise_for_status().json()["data"][0]["id"],
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0.7,
        "seed": 1,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    answer, times = "", []
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
                answer += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                if victim is not None and len(times) == KILL_AFTER:
                    os.kill(victim, signal.SIGKILL)
    return answer, max(after - before for before, after in pairwise(times))


def find(client: httpx.Client, victim: str) -> int:
    """Return the pid of the first process of this kind. Raises while there is none, or /status is away."""
    (model, *_) = client.get("/status").raise_for_status().json()["models"]
    process = {
        "expert group": lambda: model["groups"][0]["process"],
        "router": lambda: model["router"],
        "engine": lambda: model["engines"][0]["process"],
    }[victim]()
    return int(process["pid"])


def wait_for_another(client: httpx.Client, victim: str, pid: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if find(client, victim) != pid:
                time.sleep(2)  # until the newcomer has settled in
                return
        except (httpx.HTTPError, IndexError):
            pass
        time.sleep(0.2)
    raise SystemExit(f"no other {victim} came within 120 s")


if __name__ == "__main__":
    main()
