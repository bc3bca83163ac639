"""What the README tells a reader to type is typed here."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.system.demo_deployment import REPOSITORY, Deployment

pytestmark = pytest.mark.system

README = (REPOSITORY / "README.md").read_text()
URL = "http://127.0.0.1:8000"


def the_only(pattern: str, deployment: Deployment) -> str:
    """Return the one piece of the README that matches, as it reads for this deployment's port."""
    (piece,) = re.findall(pattern, README, re.MULTILINE | re.DOTALL)
    assert URL in piece
    return piece.replace(URL, deployment.url)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_command_is_answered(deployment: Deployment) -> None:
    command = the_only(r"^curl .*?[^\\]$", deployment)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=120)
    assert "Paris" in json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_the_python_snippet_streams_an_answer(deployment: Deployment) -> None:
    snippet = the_only(r"^```python\n(.*?)^```$", deployment)
    snippet = snippet.replace("stream=True", "stream=True, max_tokens=32")  # it may be a long story
    done = subprocess.run(
        [sys.executable, "-c", snippet], capture_output=True, text=True, check=True, timeout=120
    )
    assert len(done.stdout.split()) > 1
