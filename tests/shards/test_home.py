from pathlib import Path

import pytest

from shards.home import default_home


@pytest.mark.parametrize(
    ("value", "home"),
    [
        ("/data/tradewind", Path("/data/tradewind")),
        ("~/x", Path.home() / "x"),
        ("", Path.home() / ".cache" / "tradewind"),
    ],
)
def test_the_home_is_what_the_environment_says(monkeypatch, value, home):
    monkeypatch.setenv("TRADEWIND_HOME", value)
    assert default_home() == home
