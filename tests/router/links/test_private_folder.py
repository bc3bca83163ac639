"""Where sockets may be: whose folder it must be otherwise is in test_listener.py."""

from pathlib import Path

import pytest

from router.links.private_folder import make_private


def test_it_is_made_with_the_folders_above_it_and_closed_to_others(tmp_path: Path) -> None:
    directory = tmp_path / "above" / "sockets"
    for _ in range(2):  # and found the second time
        make_private(directory)
        assert directory.stat().st_mode & 0o777 == 0o700


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sockets").touch(mode=0o600)
    with pytest.raises(ValueError, match="must be a folder"):
        make_private(tmp_path / "sockets")


@pytest.mark.parametrize("target", [".", "nowhere"])
def test_a_symbolic_link_is_refused_wherever_it_leads(tmp_path: Path, target: str) -> None:
    link = tmp_path / "sockets"
    link.symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match="must be a folder"):
        make_private(link)
