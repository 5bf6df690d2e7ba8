"""Run by test_estimate.py as a process of its own: estimates of two stages, then the stages, and what they took.

python estimated_run.py MODEL WORK
"""

import functools
import json
import resource
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moepress.calibration.hessian import hessian_for
from moepress.compress.gptq.include import Include
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
}
MACHINES = {"everything": Machine(device="cpu", memory_bytes=512 << 20)}  # so that all tokens can wait


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


def watched(folder: Path, work: Any) -> dict[str, float]:
    """Seconds, peak of resident memory so far, peak of the folder's size."""
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak.append(folder_bytes(folder))

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    stop.set()
    thread.join()
    return {"seconds": seconds, "memory": peak_resident_bytes(), "disk": max(peak), "output": folder_bytes(folder)}


def main() -> None:
    model, work = sys.argv[1], Path(sys.argv[2])
    work.mkdir()
    place = Output(folder=work / "profile")
    profile = asdict(profile_estimate(model, CALIBRATION, MACHINE))
    found = {
        "profile": [profile, watched(work, lambda: profile_stage(model, place, CALIBRATION, MACHINE))],
    }

    def quantize(folder: Path, name: str, *, dry_run: bool) -> dict[str, Any]:
        machine, place = MACHINES.get(name, MACHINE), Output(folder=folder / "out")
        return quantize_stage(model, place, None, REQUESTS[name], CALIBRATION, machine, dry_run=dry_run)

    for name in REQUESTS:
        folder = work / name
        folder.mkdir()
        estimate = quantize(folder, name, dry_run=True)
        found[name] = [estimate, watched(folder, functools.partial(quantize, folder, name, dry_run=False))]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
