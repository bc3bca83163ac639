"""Another job on a deployment's Ray cluster: it takes every logical CPU that is free, or gets free.

    python other_job.py ADDRESS

It says "waiting" when it has all that are free and stands in line for the next, "there was another CPU" when
it has that, too, and ends with its input.
"""

import sys

import ray


@ray.remote(num_cpus=1)
class Worker:
    def is_here(self) -> bool:
        return True


def main() -> None:
    ray.init(sys.argv[1], log_to_driver=False)
    num_free = int(ray.available_resources().get("CPU", 0))
    first = [Worker.remote() for _ in range(num_free)]
    ray.get([worker.is_here.remote() for worker in first])
    next_in_line = Worker.remote()
    arrival = next_in_line.is_here.remote()
    arrived, _ = ray.wait([arrival], timeout=2)
    if not arrived:
        print("waiting", flush=True)
        ray.get(arrival)
    print("there was another CPU", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
