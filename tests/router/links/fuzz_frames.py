"""Search for bytes that break a link or a handshake, guided by coverage; see `make fuzz`.

    python tests/router/links/fuzz_frames.py -max_total_time=60

Takes libFuzzer's options. Ends with the first input that raises anything but LinkLost, and saves it.
"""

import random
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[3]))

with atheris.instrument_imports(include=["router.links"]):
    from tests.router.links import hostile_bytes


def check_one(data: bytes) -> None:
    """Read the first byte as what to do with the others, so that the search gets behind the magic numbers."""
    choice, data = data[:1], data[1 : hostile_bytes.MAX_BYTES]
    rng = random.Random(data[:8])
    if choice < b"\x40":
        hostile_bytes.feed_link(data)
    elif choice < b"\x80":
        hostile_bytes.feed_link(hostile_bytes.random_frames(rng) + data)
    elif choice < b"\xc0":
        hostile_bytes.feed_link(hostile_bytes.damaged(hostile_bytes.random_frames(rng), rng) + data)
    else:
        hostile_bytes.feed_handshake(data)


if __name__ == "__main__":
    atheris.Setup(sys.argv, check_one)
    atheris.Fuzz()
