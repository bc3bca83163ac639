"""Another job on a deployment's Ray cluster: it takes every logical CPU that is free, or gets free.

    python other_job.py ADDRESS

It says "waiting" when it has all that are free and stands in line for the next, "there was another CPU" when
it has that, too, and ends with its input.
"""

import sys
import time

import ray

WORKER_START_S = 60.0
RESOURCES_TOLD_S = 1.0  # nodes tell Ray what is in use several times a second; this much later it is known


@ray.remote(num_cpus=1)
class Worker:
    def is_here(self) -> bool:
        return True


def main() -> None:
    ray.init(sys.argv[1], log_to_driver=False)
    workers = []
    while ray.available_resources().get("CPU", 0) >= 1:
        workers.append(Worker.remote())
        ray.get(workers[-1].is_here.remote(), timeout=WORKER_START_S)
        time.sleep(RESOURCES_TOLD_S)
    next_in_line = Worker.remote()
    print("waiting", flush=True)
    ray.get(next_in_line.is_here.remote())
    print("there was another CPU", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
