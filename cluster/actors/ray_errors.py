"""What goes wrong in a Ray call, as the caller sees it."""

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

# Nobody answers, or not in time; a later call may fare better.
UNREACHABLE = (RayError, RayServeException, TimeoutError)


def sentence(error: Exception) -> str:
    """Return what was raised at the other end; Ray's own text for it is a traceback."""
    return str(error.cause if isinstance(error, RayTaskError) else error)
