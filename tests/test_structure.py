"""The architecture, held: imports point one way, and the command line starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# each package may import those before it; `top` are the single files beside them
ORDER = ["errors", "memory", "config", "address", "device", "data", "store", "extract", "model",
         "train", "evaluate", "sweep", "commands", "pipeline"]  # fmt: skip
# the data's way through the house, which never turns back
SKIPS = {
    "data": {"errors", "config", "address"},
    "store": {"errors", "config"},
    "model": {"errors", "config", "address", "device"},
}


def packages() -> list[str]:
    return [name for name in ORDER if (ROOT / name).is_dir()]


def ours(path: Path) -> set[str]:
    """First component after `epalm.` of every import of ours in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("epalm."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "epalm":
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("epalm."))
    return found


def files_of(name: str) -> list[Path]:
    return sorted((ROOT / name).rglob("*.py")) if (ROOT / name).is_dir() else [ROOT / f"{name}.py"]


def test_imports_point_one_way() -> None:
    for position, name in enumerate(ORDER):
        allowed = SKIPS.get(name, set(ORDER[:position])) | {name}
        for path in files_of(name):
            assert ours(path) <= allowed, f"{path.relative_to(ROOT)} imports {ours(path) - allowed}"


def test_every_python_file_has_a_place_in_the_order() -> None:
    top = {p.stem for p in ROOT.glob("*.py")} - {"__init__"}
    folders = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert top | folders == set(ORDER)


def test_data_and_store_do_without_torch() -> None:
    for name in ("data", "store", "config", "address"):
        for path in files_of(name):
            assert "torch" not in path.read_text().split('"""', 2)[-1], path


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys; from epalm.pipeline import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'timm', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "extract" in done.stdout


def test_script_and_package_are_the_same_command_line(tmp_path: Path) -> None:
    outputs = [
        subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
        for command in (
            [sys.executable, str(ROOT / "pipeline.py"), "--help"],
            [str(Path(sys.executable).with_name("epalm")), "--help"],
        )
    ]
    assert outputs[0].split("\n", 1)[1] == outputs[1].split("\n", 1)[1]
