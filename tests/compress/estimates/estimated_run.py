"""Run by test_estimate.py as a process of its own: estimates of two stages, then the stages, and what they took.

python estimated_run.py MODEL WORK
"""

import functools
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moepress.calibration.hessian import hessian_for
from moepress.compress.gptq.include import Include
from moepress.compress.gptq.options import EFFORTS
from moepress.converters.safetensors.scheme import Scheme
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.profile import profile_estimate, profile_stage
from moepress.stages.quantize import QuantizeRequest, quantize_stage

CALIBRATION = Calibration(tokens=4_096, window=256)
MACHINE = Machine(device="cpu", memory_bytes=96 << 20)
SCHEME = Scheme(bits=4, group_size=128)
REQUESTS = {
    "quantize": QuantizeRequest(scheme=SCHEME),
    "original": QuantizeRequest(scheme=SCHEME, hessian=hessian_for("original", SCHEME.bits, {})),
    "everything": QuantizeRequest(
        scheme=SCHEME, hessian=hessian_for("original", SCHEME.bits, {}), include=frozenset(Include)
    ),
    "max": QuantizeRequest(
        scheme=SCHEME,
        hessian=hessian_for("original", SCHEME.bits, {}, "max"),
        solver=EFFORTS["max"],
        include=dict.fromkeys(Include),
    ),
}
MACHINES = dict.fromkeys(("everything", "max"), Machine(device="cpu", memory_bytes=512 << 20))  # all tokens can wait


def peak_resident_bytes() -> int:
    """Of this process alone: `ru_maxrss` begins with what the parent held when it forked."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # renamed or deleted meanwhile
            continue
    return total


class DiskPeak:
    """The most that a folder held. It only shrinks where a file is deleted, replaced or cut, which Python announces to
    audit hooks (PEP 578) before it is done: right before each of these the folder is measured, and at the end, so that
    no peak lies between, however busy the machine.
    """

    _SHRINKS = frozenset(("os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree"))

    def __init__(self) -> None:
        self.bytes, self._measuring = 0, threading.RLock()
        self._folder: Path | None = None
        sys.addaudithook(self._announced)

    def begin(self, folder: Path) -> None:
        self.bytes, self._folder = 0, folder

    def end(self) -> int:
        self.measure()
        self._folder = None
        return self.bytes

    def measure(self) -> None:
        with self._measuring:
            if self._folder is not None:
                self.bytes = max(self.bytes, folder_bytes(self._folder))

    def _announced(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self._SHRINKS or (event == "open" and arguments[2] & os.O_TRUNC):
            self.measure()


def watched(disk: DiskPeak, folder: Path, work: Callable[[], object]) -> dict[str, float]:
    """Seconds, peak of resident memory so far, peak of the folder's size, and its size at the end."""
    disk.begin(folder)
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory": peak_resident_bytes(), "disk": disk.end(), "output": folder_bytes(folder)}


def main() -> None:
    model, work, disk = sys.argv[1], Path(sys.argv[2]), DiskPeak()
    work.mkdir()
    place = Output(folder=work / "profile")
    profile = asdict(profile_estimate(model, CALIBRATION, MACHINE))
    found = {
        "profile": [profile, watched(disk, work, lambda: profile_stage(model, place, CALIBRATION, MACHINE))],
    }

    def quantize(folder: Path, name: str, *, dry_run: bool) -> dict[str, Any]:
        machine, place = MACHINES.get(name, MACHINE), Output(folder=folder / "out")
        return quantize_stage(model, place, None, REQUESTS[name], CALIBRATION, machine, dry_run=dry_run)

    for name in REQUESTS:
        folder = work / name
        folder.mkdir()
        estimate = quantize(folder, name, dry_run=True)
        found[name] = [estimate, watched(disk, folder, functools.partial(quantize, folder, name, dry_run=False))]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
