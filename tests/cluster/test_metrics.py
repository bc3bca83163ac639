import os
import subprocess
import sys

from prometheus_client import CollectorRegistry

from cluster.metrics import EngineMetrics, ExpertMetrics, GatewayMetrics, RouterMetrics, exposition

KINDS = (GatewayMetrics, EngineMetrics, RouterMetrics, ExpertMetrics)

COUNT = """
from cluster.metrics import EngineMetrics, exposition
metrics = EngineMetrics()
metrics.running.labels("m").set(3)
metrics.preemptions.labels("m").inc(2)
metrics.step_seconds.labels("m").observe(0.02)
"""


def python(code, directory):
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, timeout=60, check=True, capture_output=True, text=True
    ).stdout


def test_all_kinds_of_processes_can_share_a_registry():
    registry = CollectorRegistry()
    for kind in KINDS:
        kind(registry)
    names = [metric.name for metric in registry.collect()]
    assert all(name.startswith("tradewind_") for name in names)
    assert len(names) == len(set(names))


def test_importing_the_file_twice_does_no_harm(tmp_path):
    python("import importlib, cluster.metrics as m; importlib.reload(m).GatewayMetrics()", tmp_path)


def test_the_folder_of_the_node_is_made_with_the_first_metric_and_not_before(tmp_path):
    folder = tmp_path / "node" / "metrics"
    python("import cluster.metrics", folder)
    assert not folder.exists()
    python("from cluster.metrics import ExpertMetrics; ExpertMetrics().rows.labels(1, 2, 3)", folder)
    assert list(folder.iterdir())


def test_a_single_process_exposes_its_registry():
    registry = CollectorRegistry()
    ExpertMetrics(registry).rows.labels("m", "group-0", "3").inc(7)
    assert b'tradewind_expert_rows_total{expert="3",group="group-0",model="m"} 7.0' in exposition(registry)


def test_processes_of_a_node_are_summed_and_gauges_of_the_dead_are_dropped(tmp_path):
    python(COUNT, tmp_path)
    python(COUNT, tmp_path)
    exposed = python(COUNT + "print(exposition().decode())", tmp_path)
    assert 'tradewind_engine_preemptions_total{model="m"} 6.0' in exposed
    assert 'tradewind_engine_step_duration_seconds_count{model="m"} 3.0' in exposed
    assert 'tradewind_engine_requests_running{model="m"} 3.0' in exposed


def test_what_dead_processes_counted_stays_and_their_files_do_not(tmp_path):
    num_files = set()
    for num_dead in range(4):
        exposed = python(COUNT + "print(exposition().decode())", tmp_path)
        total = num_dead + 1
        assert f'tradewind_engine_preemptions_total{{model="m"}} {2.0 * total}' in exposed
        assert (
            f'tradewind_engine_step_duration_seconds_bucket{{le="0.025",model="m"}} {float(total)}' in exposed
        )
        if num_dead:
            num_files.add(len(list(tmp_path.glob("*.db"))))
    assert len(num_files) == 1, f"there are more and more files: {num_files}"
