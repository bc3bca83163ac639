"""Where Tradewind keeps what it downloads and builds."""

import os
from pathlib import Path


def default_home() -> Path:
    """Return $TRADEWIND_HOME, or ~/.cache/tradewind if that is unset or empty."""
    return Path(os.environ.get("TRADEWIND_HOME") or "~/.cache/tradewind").expanduser()
