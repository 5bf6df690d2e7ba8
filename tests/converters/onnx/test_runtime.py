"""The extras: real sessions here, and what is said where packages are absent, gutted or broken."""

import os
import tomllib
from pathlib import Path

import onnx
import onnxruntime
import pytest
from other_sites import ONNX_RUNTIME, ROOT, add_gutted_onnxruntime, add_metadata, other_site, python_in

from moepress.converters.onnx.runtime import (
    TESTED_ONNXRUNTIME,
    installed_version,
    require_onnx,
    require_onnxruntime,
    runtime_state,
    session_options,
    session_providers,
)

PROGRAM = """
from moepress.converters.onnx.runtime import {0}
from moepress.errors import UnsupportedError
try:
    print("imported", {0}().__name__)
except UnsupportedError as error:
    print(error)
"""


def answer(site: Path, function: str) -> str:
    found = python_in(site, "-c", PROGRAM.format(function))
    assert (found.returncode, found.stderr) == (0, "")
    return found.stdout.strip()


def test_the_modules_are_those_that_are_installed() -> None:
    assert require_onnx() is onnx
    assert require_onnxruntime() is onnxruntime
    assert installed_version("onnx") == onnx.__version__
    assert installed_version("a-package-that-is-not-there") is None


def test_a_session_tells_its_providers() -> None:
    assert session_providers("CPUExecutionProvider") == ("CPUExecutionProvider",)


def test_a_provider_that_is_not_there_gives_the_cpu_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    assert session_providers("DmlExecutionProvider") == ("CPUExecutionProvider",)
    assert capfd.readouterr() == ("", "")


def test_options_of_sessions_keep_warnings_back() -> None:
    assert session_options().log_severity_level == 4  # errors come as exceptions
    assert onnxruntime.SessionOptions().log_severity_level != 4


def test_the_state_is_that_of_this_runtime(capfd: pytest.CaptureFixture[str]) -> None:
    state = runtime_state()
    assert state.version == onnxruntime.__version__
    assert (state.error, state.onnx_error) == (None, None)
    assert list(state.available) == onnxruntime.get_available_providers()
    assert {s.asked: s.got for s in state.sessions}["CPUExecutionProvider"] == ("CPUExecutionProvider",)
    assert capfd.readouterr() == ("", "")  # what the runtime says is in the sessions


def test_stderr_works_again_after_looking(capfd: pytest.CaptureFixture[str]) -> None:
    runtime_state()
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_what_is_absent_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    site = other_site(tmp_path / "site", without=("onnx", *ONNX_RUNTIME))
    for function, name in (("require_onnx", "onnx"), ("require_onnxruntime", "ONNX Runtime")):
        said = answer(site, function)
        assert said.startswith(f"{name} is not installed; ")
        assert 'pip install "moepress[onnx]"' in said
        assert "moepress[onnx-gpu]" in said


def test_a_gutted_runtime_is_told_from_an_absent_one(tmp_path: Path) -> None:
    site = other_site(tmp_path / "site", without=ONNX_RUNTIME)
    add_gutted_onnxruntime(site)
    said = answer(site, "require_onnxruntime")
    assert "is gutted" in said
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in said


def test_two_wheels_are_no_error_while_the_module_is_whole(tmp_path: Path) -> None:
    site = other_site(tmp_path / "site", without=())
    add_metadata(site, "onnxruntime-gpu", "1.31.1")
    assert answer(site, "require_onnxruntime") == "imported onnxruntime"


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
@pytest.mark.parametrize("fault", ["import a_library_that_is_missing", "raise OSError('libx.so: no such file')"])
def test_a_package_that_fails_to_import_is_told_with_the_reason(tmp_path: Path, name: str, fault: str) -> None:
    site = other_site(tmp_path / "site", without=("onnx", *ONNX_RUNTIME))
    (site / f"{name}.py").write_text(fault)
    said = answer(site, f"require_{name}")
    assert said.startswith(f"{name} does not import (")
    assert "a_library_that_is_missing" in said or "libx.so" in said
    assert "pip " in said


def test_an_onnx_folder_without_files_is_told(tmp_path: Path) -> None:
    site = other_site(tmp_path / "site", without=("onnx",))
    (site / "onnx").mkdir()
    assert "without its files" in answer(site, "require_onnx")


def test_the_tested_versions_are_those_of_the_extras() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    low, high = (".".join(map(str, version)) for version in TESTED_ONNXRUNTIME)
    assert f"onnxruntime>={low},<{high}" in extras["onnx"]
    assert f"onnxruntime-gpu>={low},<{high}" in extras["onnx-gpu"]
