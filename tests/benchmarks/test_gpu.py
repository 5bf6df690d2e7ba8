"""The script for a GPU: steps that hang or fail, and a machine without CUDA."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu")


def test_all_steps_on_a_gpu_fit_into_ten_minutes(gpu: ModuleType) -> None:
    found = gpu.steps(Path("work"), cuda=True, small=False)
    assert sum(step.limit_seconds for step in found) <= 570
    assert all((FOLDER.parent / part).exists() for step in found for part in step.command if part.startswith("tests"))
    assert all(Path(step.command[0]).is_file() for step in found if step.command[0] != "-m")
    results = {step.figures for step in found if step.figures}
    assert {file.parent for file in results} == {FOLDER / "results"}
    assert FOLDER / "results" / "r1_layer.json" not in results  # measured on a processor, and projected from


def test_a_step_that_hangs_goes_with_all_that_it_started(gpu: ModuleType, tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = (
        f"import subprocess, sys; p = subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w').write(str(p.pid)); "
    )
    step = gpu.Step(name="hangs", command=("-c", code + "print('begun', flush=True); p.wait()"), limit_seconds=3)
    row = gpu.run(step, gpu.environment(tmp_path), tmp_path / "log")
    assert (row["outcome"], row["exit_status"], row["said"].strip()) == ("timed out", None, "begun")
    assert row["seconds"] < 20
    state = Path("/proc") / child.read_text() / "stat"
    for _ in range(50):  # the killed child is someone else's to wait for
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the step's own child is still there")


def test_a_step_says_how_it_ended_and_brings_its_figures_of_this_run(gpu: ModuleType, tmp_path: Path) -> None:
    figures, around = tmp_path / "figures.json", gpu.environment(tmp_path)
    figures.write_text('{"of": "an earlier run"}')

    def outcome(code: str, **more: object) -> tuple[str, object]:
        row = gpu.run(gpu.Step(name="one", command=("-c", code), limit_seconds=60, **more), around, tmp_path / "log")
        return row["outcome"], row["figures"]

    assert outcome("import sys; sys.exit(3)", figures=figures) == ("failed", None)
    assert outcome("import sys; sys.exit(5)", mild=((5, "no tests"),)) == ("no tests", None)
    write = f"import json, moepress; json.dump(moepress.__file__, open({str(figures)!r}, 'w'))"
    assert outcome(write, figures=figures) == ("passed", str(tmp_path / "path" / "moepress" / "__init__.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so_in_one_sentence() -> None:
    done = subprocess.run([sys.executable, FOLDER / "gpu.py"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "torch finds no CUDA device here; --device cpu --small tries the script."


@pytest.mark.slow
def test_the_script_is_tried_on_the_processor(tmp_path: Path) -> None:
    file, before = tmp_path / "gpu.json", sorted((FOLDER / "results").iterdir())
    command = [sys.executable, FOLDER / "gpu.py", "--device", "cpu", "--small", "--json", str(file)]
    command += ["--work", str(tmp_path), "--steps", "kernels", "solver", "r1"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert [(step["step"], step["outcome"]) for step in found["steps"]] == [
        ("kernels", "passed"),
        ("solver", "passed"),
        ("r1", "passed"),
    ]
    layer = found["steps"][2]["figures"]
    assert (layer["rows"][0]["solved_experts"], layer["options"]["device"]) == (32, "cpu")
    assert found["versions"]["torch"] == torch.__version__
    assert sorted((FOLDER / "results").iterdir()) == before
    assert not list(tmp_path.glob("moepress-gpu-*"))
