"""Addresses: each kind found, and each kind's message when it is not."""

from pathlib import Path

import pytest

from epalm.address import cache_dir, digest, resolve
from epalm.errors import EpalmError, first_line

EASY_VQA = "wheel:easy-vqa==1.0"
SHA = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"


def test_local_path(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(EpalmError, match="no such file or folder"):
        resolve(str(tmp_path / "gone"))


def test_wheel_is_fetched_checked_and_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPALM_CACHE", str(tmp_path))
    inside = "easy_vqa/data/answers.txt"
    found = resolve(f"{EASY_VQA}/{inside}#sha256={SHA}")
    assert "rectangle" in found.read_text()
    assert resolve(EASY_VQA) == found.parents[2]
    with pytest.raises(EpalmError, match="holds no gone.txt"):
        resolve(f"{EASY_VQA}/gone.txt")
    with pytest.raises(EpalmError, match=r"holds no \.\./\.\./sha256"):
        resolve(f"{EASY_VQA}/../../sha256")
    with pytest.raises(EpalmError, match=f"sha256 is {SHA}"):
        resolve(f"{EASY_VQA}#sha256={'0' * 64}")


def test_wheel_with_another_hash_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPALM_CACHE", str(tmp_path))
    folder = cache_dir() / "wheels" / "easy-vqa==1.0"
    folder.mkdir(parents=True)
    (folder / "easy_vqa-1.0-py3-none-any.whl").write_bytes(b"something else")
    with pytest.raises(EpalmError, match="sha256 is"):
        resolve(f"{EASY_VQA}#sha256={SHA}")
    with pytest.raises(EpalmError, match="is not a wheel; delete it"):
        resolve(EASY_VQA)
    assert not (folder / "unpacked").exists()


def test_offline_wheel_says_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPALM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(EpalmError, match="put the wheel file into") as error:
        resolve(EASY_VQA)
    assert str(tmp_path / "wheels" / "easy-vqa==1.0") in str(error.value)


@pytest.mark.parametrize(
    "address", ["hf:facebook/opt-125m", "timm:vit_base_patch16_224.augreg_in1k"]
)
def test_offline_hub_says_what_and_how(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere/hub")
    with pytest.raises(EpalmError) as error:
        resolve(address)
    for word in (address, "local cache", "folder's path"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("wheel:easy-vqa", "write it as wheel:NAME==VERSION"),
        ("timm:vit_base_patch17", "no such pretrained model"),
        ("hf:not a name", "hf:not a name"),
    ],
)
def test_malformed(address: str, word: str) -> None:
    with pytest.raises(EpalmError, match=word):
        resolve(address)


def test_digest(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert digest(file).startswith("ba7816bf8f01cfea")


@pytest.mark.parametrize(
    ("said", "words"), [("one\ntwo", "one"), ("\n one\n", "one"), ("", "ValueError")]
)
def test_reasons_are_one_line_and_never_empty(said: str, words: str) -> None:
    """The hub's client raises errors that say nothing, too."""
    assert first_line(ValueError(said)) == words
