"""What went wrong at the endpoint, as a sentence."""

import httpx


def sentence(error: Exception) -> str:
    """Word an error for a person: who does not answer, or what the answer says."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return (
            f"nobody answers at {error.request.url.copy_with(path='/')}; is `tradewind serve` running there? "
            "--url, or TRADEWIND_URL, says where it is"
        )
    if isinstance(error, httpx.HTTPStatusError):
        return f"{error.request.url} answers: {answered(error.response)}"
    return str(error) or type(error).__name__


def answered(response: httpx.Response) -> str:
    """Return what an answer that is an error says; it may be a proxy's, which has no body of ours.

    The body must have been read.
    """
    return _message(response) or f"{response.status_code} {response.reason_phrase}"


def is_passing(error: httpx.HTTPError) -> bool:
    """Say whether the same request may succeed a little later: something of the deployment is restarting."""
    if isinstance(error, httpx.HTTPStatusError):
        # A proxy that sees no gateway for a moment has words of its own for it, even "404".
        return error.response.is_server_error or _message(error.response) is None
    return isinstance(error, httpx.TransportError)


def _message(response: httpx.Response) -> str | None:
    """Return the message of an error body of ours, None if it has another one."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None
