"""What is installed: every package folder, every recipe, and a wheel that holds them."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_folder_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    ignored = {"tests", "build", ".venv", ".types"}
    found = {
        ".".join(("epalm", *path.parent.relative_to(ROOT).parts))
        for path in ROOT.rglob("__init__.py")
        if not ignored & set(path.relative_to(ROOT).parts)
    }
    assert listed == found


def test_wheel_holds_packages_and_recipes(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves folders behind; not in the checkout
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in tracked:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path),
         str(source)],
        check=True,
    )  # fmt: skip
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {"epalm/pipeline.py", "epalm/store/spec.py", "epalm/recipes/demo.yaml"} <= names
    assert not any(name.startswith(("tests/", "epalm/tests/")) for name in names)
