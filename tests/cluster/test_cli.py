import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TRADEWIND = Path(sys.executable).with_name("tradewind")


def error(*arguments: str, **environment: str) -> str:
    """Run `tradewind`, which must fail; return the one line that it says."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRADEWIND_URL"}
    done = subprocess.run(
        [TRADEWIND, *arguments], capture_output=True, text=True, timeout=60, env=inherited | environment
    )
    assert done.returncode == 1, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture
def nobody():
    """A URL where nobody listens: the port is bound, so that nobody else takes it, but it is not open."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["status", "--json"],
        ["chat"],
        ["experts", "scale", "4"],
        ["experts", "rebalance"],
        ["experts", "drain", "0"],
    ],
)
def test_when_nobody_answers_one_sentence_says_where_and_what_to_start(command, nobody):
    assert error(*command, "--url", nobody) == (
        f"error: nobody answers at {nobody}/; is `tradewind serve` running there? "
        "--url, or TRADEWIND_URL, says where it is"
    )


def test_the_url_may_come_from_the_environment(nobody):
    assert nobody in error("status", TRADEWIND_URL=nobody)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://127.0.0.1:80000"])
def test_a_url_that_is_none_ends_in_one_sentence(url):
    assert error("status", "--url", url).startswith("error: ")


def test_a_configuration_that_is_not_there_ends_in_one_sentence(tmp_path):
    path = tmp_path / "none.yaml"
    assert error("serve", str(path)).startswith(f"error: {path} does not exist")


def test_a_port_that_there_is_not_ends_in_one_sentence(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("models: [{name: m, checkpoint: c}]")
    assert error("serve", str(path), "--port", "99999").startswith("error: --port is 99999")
