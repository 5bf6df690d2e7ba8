"""`doctor`: this machine as it is, other machines as facts, other environments in processes of their own."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import psutil
import pytest
import torch
from other_sites import ONNX_RUNTIME, add_gutted_onnxruntime, add_metadata, other_site, python_in
from stage_runs import command

from moepress.converters.onnx.runtime import Runtime, Session
from moepress.stages.doctor import (
    PACKAGES,
    Device,
    Disk,
    Facts,
    Machine,
    Torch,
    clashes_of,
    diagnose,
    hints_of,
    judge,
    notes_of,
    reason_of,
)

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
# Of onnxruntime-gpu 1.31.1 on a machine without a GPU.
SAID = (
    "\x1b[1;31m2026-11-23 16:07:57.788312983 [E:onnxruntime:Default, provider_bridge_ort.cc:2458 operator()] "
    "/onnxruntime_src/onnxruntime/core/session/provider_bridge_ort.cc:2043 onnxruntime::Provider& "
    "onnxruntime::ProviderLibrary::Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load library "
    "/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open "
    "shared object file: No such file or directory\n\x1b[m"
)
H100 = Device(name="NVIDIA H100", memory_bytes=80 << 30, free_memory_bytes=79 << 30)
HEALTHY = Facts(
    machine=Machine(
        moepress="0.1.0",
        python="3.11.7",
        system="Linux",
        cpu="a processor",
        cores=16,
        memory_bytes=128 << 30,
        free_memory_bytes=100 << 30,
    ),
    disks=(Disk(use="folder", folder="/data", free_bytes=500 << 30),),
    packages=dict.fromkeys(PACKAGES) | {"onnx": "1.23.2", "onnxruntime-gpu": "1.31.1", "torch": "2.13.0"},
    torch=Torch(cuda_build="13.0", devices=(H100,)),
    runtime=Runtime(
        version="1.31.1",
        available=(TENSORRT, CUDA, CPU),
        sessions=(Session(asked=CPU, got=(CPU,)), Session(asked=CUDA, got=(CUDA, CPU))),
    ),
)


def with_packages(**versions: str) -> Facts:
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    assert named.keys() <= set(PACKAGES)
    return replace(HEALTHY, packages=HEALTHY.packages | named)


def with_runtime(**changes: Any) -> Facts:
    return replace(HEALTHY, runtime=replace(HEALTHY.runtime, **changes))


def only(facts: Facts) -> str:
    """The one problem of these facts, which is no clash."""
    found = judge(facts)
    assert (len(found.problems), found.clashes) == (1, ()), found.problems
    return found.problems[0]


def test_a_healthy_machine_has_no_problem() -> None:
    found = judge(HEALTHY)
    assert (found.problems, found.clashes, found.notes) == ((), (), ())


def test_both_wheels_are_a_clash_that_says_how_to_get_out() -> None:
    [clash] = clashes_of(with_packages(onnxruntime="1.32.0"))
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1" in clash
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in clash
    assert "genai" not in clash
    [clash] = clashes_of(with_packages(onnxruntime="1.32.0", onnxruntime_genai="0.18.0"))
    assert "onnxruntime-genai-cuda" in clash


def test_a_runtime_that_cannot_be_used_is_the_only_clash_told() -> None:
    facts = with_packages(onnxruntime="1.32.0")
    facts = replace(facts, runtime=Runtime(error="The package onnxruntime is gutted."))
    assert judge(facts).problems == ("The package onnxruntime is gutted.",)


def test_an_absent_runtime_is_a_note() -> None:
    facts = replace(HEALTHY, packages=dict.fromkeys(PACKAGES), runtime=Runtime(onnx_error="onnx is not installed."))
    [note] = notes_of(facts)
    assert 'pip install "moepress[onnx]"' in note
    assert judge(facts).problems == ()


def test_a_runtime_without_onnx_is_a_problem() -> None:
    assert only(with_runtime(onnx_error="onnx is not installed; do this.", sessions=())).startswith("onnx is not")


def test_a_provider_that_is_claimed_and_not_obtained_is_told_with_the_reason() -> None:
    problem = only(with_runtime(sessions=(Session(asked=CPU, got=(CPU,)), Session(asked=CUDA, got=(CPU,), said=SAID))))
    assert f"lists {CUDA}, but a session that asked for it got {CPU}" in problem
    assert "(libcublasLt.so.13: cannot open shared object file: No such file or directory)" in problem
    assert "onnxruntime-gpu[cuda,cudnn]" in problem
    other = only(with_runtime(sessions=(Session(asked="DmlExecutionProvider", got=(CPU,)),)))
    assert "cudnn" not in other
    assert "nothing" in only(with_runtime(sessions=(Session(asked=CUDA, got=()),)))
    assert "on the CPU" in only(with_runtime(sessions=(Session(asked=CPU, got=(), said="no"),)))


def test_tensorrt_is_not_missed() -> None:
    assert hints_of(with_runtime(sessions=(Session(asked=TENSORRT, got=(CUDA, CPU), said=SAID),))) == ()


def test_a_reason_is_the_end_of_the_log_line_or_the_first_line() -> None:
    assert reason_of(SAID).startswith("libcublasLt.so.13: cannot")
    assert "\x1b" not in reason_of(SAID)
    assert reason_of("CUDA failure 100.\nmore") == "CUDA failure 100"


@pytest.mark.parametrize(
    ("version", "tested"),
    [("1.30.2", False), ("1.31.0", True), ("1.32.9", True), ("1.33.0", False), ("2.31.0", False), ("dev", False)],
)
def test_versions_outside_of_the_tested_range_are_told(version: str, tested: bool) -> None:
    found = hints_of(with_runtime(version=version))
    assert found == () if tested else f"onnxruntime {version} is not among" in found[0]
    assert tested or '"onnxruntime-gpu>=1.31,<1.33"' in found[0]


def test_a_cuda_build_of_torch_without_a_device_is_told() -> None:
    problem = only(replace(HEALTHY, torch=Torch(cuda_build="13.0", error="The driver is too old")))
    assert "CUDA 13.0 and finds no usable device (The driver is too old)" in problem
    assert judge(replace(HEALTHY, torch=Torch())).problems == ()  # a CPU build misses nothing
    assert "torch does not import (libx.so)" in only(replace(HEALTHY, torch=Torch(imported=False, error="libx.so")))


def test_little_disk_is_told_for_all_places_at_once() -> None:
    disks = (
        Disk(use="folder", folder="/small", free_bytes=3 << 30),
        Disk(use="folder", folder="/large", free_bytes=10 << 30),
        Disk(use="folder", folder="/tiny", free_bytes=1 << 29),
        Disk(use="folder", folder="/strange", free_bytes=None),
    )
    problem = only(replace(HEALTHY, disks=disks))
    assert "/small (3.0 GiB) and /tiny (0.5 GiB)" in problem
    assert "/large" not in problem
    assert "/strange" not in problem


def test_auto_gptq_is_told() -> None:
    assert "pip uninstall auto-gptq" in only(with_packages(auto_gptq="0.7.1"))


def test_this_machine_is_told_as_it_is(tmp_path: Path) -> None:
    found = diagnose(tmp_path / "yet" / "to be made").facts
    assert found.machine.memory_bytes == psutil.virtual_memory().total
    assert found.machine.cores == os.cpu_count()
    assert found.machine.cpu
    assert found.disks[0].folder == str(tmp_path / "yet" / "to be made")
    assert found.disks[0].free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    assert found.packages["torch"] == torch.__version__
    assert found.torch.cuda_build == torch.version.cuda
    assert len(found.torch.devices) == torch.cuda.device_count()
    assert found.runtime.version == onnxruntime.__version__
    assert found.runtime.sessions[0].got[-1] == CPU
    assert not (tmp_path / "yet").exists()


def test_the_command_gives_json_or_a_table() -> None:
    code, printed, errors = command("doctor", "--json")
    assert code == 0, errors
    found = json.loads(printed)
    session = found["facts"]["runtime"]["sessions"][0]
    assert (session["asked"], session["got"]) == (CPU, [CPU])
    assert [f"Problem: {p}" for p in found["problems"]] == [e for e in errors.splitlines() if e.startswith("Problem")]
    code, printed, _ = command("doctor")
    assert code == 0
    assert onnxruntime.__version__ in printed
    assert f"asked for {CPU}" in printed


def doctor_in(site: Path, *, alone: bool = True) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    done = python_in(site, "-m", "moepress", "doctor", "--json", alone=alone)
    assert "Traceback" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found, done


def test_without_the_extras_it_says_what_to_install(tmp_path: Path) -> None:
    found, done = doctor_in(other_site(tmp_path / "site", without=("onnx", *ONNX_RUNTIME)))
    assert done.returncode == 0
    assert "Note: ONNX Runtime is not installed" in done.stderr
    assert 'pip install "moepress[onnx]"' in done.stderr
    assert found["clashes"] == []
    assert found["facts"]["packages"]["onnxruntime"] is None


def test_a_gutted_runtime_ends_with_5(tmp_path: Path) -> None:
    site = other_site(tmp_path / "site", without=ONNX_RUNTIME)
    add_gutted_onnxruntime(site)
    found, done = doctor_in(site)
    assert done.returncode == 5
    assert "is gutted" in found["clashes"][0]
    assert done.stderr.splitlines()[-1] == f"Error: {found['clashes'][0]}"
    assert found["facts"]["packages"]["onnxruntime-gpu"] == "1.31.1"


def test_two_wheels_end_with_5_though_sessions_work(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    add_metadata(site, "onnxruntime", "1.32.0")
    add_metadata(site, "onnxruntime-gpu", "1.31.1")
    found, done = doctor_in(site, alone=False)
    assert done.returncode == 5
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed" in done.stderr
    assert found["facts"]["runtime"]["sessions"][0]["got"] == [CPU]


def test_a_broken_torch_does_not_stop_it(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "torch.py").write_text("raise OSError('libtorch.so: cannot open shared object file')")
    found, done = doctor_in(site, alone=False)
    assert done.returncode == 0
    assert found["facts"]["torch"]["imported"] is False
    assert "Problem: torch does not import (libtorch.so" in done.stderr
