"""What is shipped: the package list, the data beside the code, what importing the command line costs."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import moepress

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = {"tests", "benchmarks", "docs", "build", "dist"}


def setuptools_settings() -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return settings


def package_folders() -> dict[str, Path]:
    """Package name -> folder, for every folder with an `__init__.py` that is not left out on purpose."""
    found = {}
    for place, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_SHIPPED and not name.startswith((".", "_"))]
        if "__init__.py" in files:
            found[".".join(("moepress", *Path(place).relative_to(ROOT).parts))] = Path(place)
    return found


def shipped_modules() -> list[Path]:
    return [file for folder in package_folders().values() for file in sorted(folder.glob("*.py"))]


def data_files(folder: Path) -> set[Path]:
    """All files below a package that are not code, those of packages inside it left out."""
    inner = [other for other in package_folders().values() if folder in other.parents]
    return {
        file
        for file in folder.rglob("*")
        if file.is_file()
        and file.suffix not in {".py", ".pyc", ".cpp"}  # what is built of .cpp ships, by setup.py
        and not file.name.startswith("_loops_")
        and not any(other in file.parents for other in inner)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    }


def test_the_package_list_equals_the_folders() -> None:
    assert sorted(setuptools_settings()["packages"]) == sorted(package_folders())


def test_package_data_covers_every_file_beside_the_code() -> None:
    patterns = setuptools_settings()["package-data"]
    for name, folder in package_folders().items():
        if name != "moepress":  # the root holds the whole repository; of it only py.typed ships
            covered = {file for pattern in patterns.get(name, []) for file in folder.glob(pattern)}
            assert data_files(folder) <= covered, f"add to package-data of {name}: {data_files(folder) - covered}"
    assert patterns["moepress"] == ["py.typed"]


def test_the_demo_model_is_beside_the_code() -> None:
    demo = package_folders()["moepress.models.demo"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in data_files(demo)}


def test_the_version_is_that_of_the_metadata() -> None:
    assert importlib.metadata.version("moepress") == moepress.__version__


def test_the_tested_package_is_that_of_this_tree() -> None:
    assert Path(moepress.__file__).resolve().parent == ROOT


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert not {file.stem for file in shipped_modules()} & {"utils", "util", "helpers", "common", "misc"}


def test_no_module_has_the_name_of_a_library_it_uses() -> None:
    assert not {file.stem for file in shipped_modules()} & {
        "safetensors",
        "onnx",
        "torch",
        "transformers",
        "tokenizers",
    }


def test_every_console_script_is_a_function_of_the_package() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    entries = {e.name: e for e in importlib.metadata.entry_points(group="console_scripts")}
    for name, target in scripts.items():
        assert entries[name].value == target
        assert callable(entries[name].load())


def test_every_requirement_has_one_exact_pin() -> None:
    pins = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [pin for pin in pins if pin]
    names = [pin.partition("==")[0].lower().replace("_", "-") for pin in pins]
    assert all("==" in pin and "+" not in pin for pin in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["onnx"], *extras["gguf"], *extras["eval"], *extras["dev"]]
    wanted = [requirement for requirement in wanted if not requirement.startswith("moepress[")]
    for requirement in wanted:
        name = requirement.split(">")[0].split("=")[0].split("[")[0].strip().lower().replace("_", "-")
        assert names.count(name) == 1, f"{name} needs exactly one line in constraints.txt"


def test_extras_with_different_onnx_runtimes_exclude_each_other() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = settings["project"]["optional-dependencies"]
    conflicts = [{entry["extra"] for entry in group} for group in settings["tool"]["uv"]["conflicts"]]
    cpu = {
        name for name, wanted in extras.items() if any(re.match(r"onnxruntime>|moepress\[onnx\]", w) for w in wanted)
    }
    gpu = {name for name, wanted in extras.items() if any(w.startswith("onnxruntime-gpu") for w in wanted)}
    assert (cpu, gpu) == ({"onnx", "dev"}, {"onnx-gpu"})
    assert all({one, other} in conflicts for one in cpu for other in gpu)


COMMANDS = [f"moepress.commands.{file.stem}" for file in sorted((ROOT / "commands").glob("[!_]*.py"))]


@pytest.mark.parametrize(
    "modules",
    [["moepress"], ["moepress.cli"], ["moepress.errors"], COMMANDS],
    ids=["package", "cli", "errors", "commands"],
)
def test_importing_the_command_line_imports_nothing_heavy(modules: list[str]) -> None:
    code = f"import sys, {', '.join(modules)}; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    heavy = {"torch", "transformers", "numpy", "pyarrow", "pydantic", "matplotlib", "jinja2", "rich", "yaml", "psutil"}
    heavy |= {"onnx", "onnxruntime", "safetensors", "tokenizers", "huggingface_hub"}
    assert not heavy & set(loaded.stdout.split())


def test_places_and_recipe_files_cost_no_torch() -> None:
    """Commands refuse wrong paths with these alone."""
    code = (
        "import sys, moepress.stages.places, moepress.stages.run.recipe_file, moepress.calibration.sources\n"
        "print(*{'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert found.stdout.split() == []


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False], ids=["compiler", "no compiler"])
def test_a_wheel_holds_the_package_and_nothing_else(tmp_path: Path, compiler: bool) -> None:
    source = tmp_path / "source"
    hidden = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "demo-out*", "out", "_loops_*")
    shutil.copytree(ROOT, source, ignore=hidden)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)]
    without = {} if compiler else {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env={**os.environ, **without})
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        built = {name for name in names if "/_loops_" in name}
        licences = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    files = [*shipped_modules(), ROOT / "py.typed"]
    files += [file for name, folder in package_folders().items() if name != "moepress" for file in data_files(folder)]
    assert bool(built) == compiler  # a build is optional: without a compiler the installation goes on
    assert names - built == {f"moepress/{file.relative_to(ROOT).as_posix()}" for file in files}
    assert licences


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, ["PASSIVE", "1000"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", "None"]),
        ({"GOMP_SPINCOUNT": "7"}, ["PASSIVE", "7"]),
    ],
)
def test_threads_wait_for_microseconds_unless_the_user_says_otherwise(given: dict[str, str], wanted: list[str]) -> None:
    """llama.cpp shares torch's OpenMP: threads that sleep at once made it ten times slower."""
    code = """
import atexit, os, sys
atexit.register(lambda: print(os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT")))
from moepress.cli import main
sys.argv = ["moepress", "--version"]
main()
"""
    plain = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain | given, check=True)
    assert made.stdout.split()[-2:] == wanted
