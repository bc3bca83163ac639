"""How long to wait before something that has failed is tried again."""

LONGEST_PAUSE_S = 30.0


def pause_s(num_failures: int) -> float:
    """Return the pause after so many failures in a row: half a second, then twice as long each time."""
    doublings = min(num_failures, 10)  # a float holds no more than a thousand of them
    return min(0.25 * 2.0**doublings, LONGEST_PAUSE_S)
