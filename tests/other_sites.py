"""Other environments than the one the tests run in: this one's packages, less some, plus what a test makes up."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ONNX_RUNTIME = ("onnxruntime", "onnxruntime_gpu")
# What is left of onnxruntime-gpu 1.31.1 after `pip uninstall onnxruntime` where both were installed, seen on Linux.
LEFT_BY_UNINSTALL = (
    "capi/libonnxruntime.so.1.31.1",
    "capi/libonnxruntime_providers_cuda.so",
    "capi/libonnxruntime_providers_tensorrt.so",
)


def other_site(folder: Path, *, without: Iterable[str]) -> Path:
    """A new site-packages folder of links to all that is installed here, less packages with their metadata."""
    folder.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            package = entry.name.partition("-")[0].partition(".")[0]
            if package not in {*without, "moepress"} and not entry.name.endswith(".pth"):
                (folder / entry.name).symlink_to(entry)
    (folder / "moepress").symlink_to(ROOT)
    return folder


def add_metadata(site: Path, name: str, version: str) -> None:
    """What tells that a wheel is installed, without the wheel."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def add_gutted_onnxruntime(site: Path) -> None:
    """onnxruntime-gpu as uninstalling onnxruntime leaves it: its metadata, and a folder that imports as a namespace."""
    add_metadata(site, "onnxruntime-gpu", "1.31.1")
    for name in LEFT_BY_UNINSTALL:
        file = site / "onnxruntime" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def python_in(site: Path, *arguments: str, alone: bool = True) -> subprocess.CompletedProcess[str]:
    """Python with this folder first on its path; `alone`, without the packages that are installed here."""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *["-S"] * alone, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=site.parent,
    )
