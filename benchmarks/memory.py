"""Peak memory of `prune` and `quantize` against the number of layers and of experts: it must not grow.

    python benchmarks/memory.py

Made Qwen3-MoE checkpoints (hidden 256, expert width 256, bf16), the same calibration tokens and --max-memory each time.
Every command is its own process; peak RSS is the kernel's figure for it (ru_maxrss), Python and torch included.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from setting import save

CASES = [(8, 16), (16, 16), (32, 16), (8, 64), (8, 128)]  # layers, experts
COMMON = ["--max-memory", "256MiB"]


def peak_mib(arguments: list[str]) -> float:
    """Run moepress with these arguments and return its peak RSS in MiB."""
    process = subprocess.Popen([sys.executable, "-m", "moepress", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"moepress {' '.join(arguments)} ended with {process.returncode}")
    return usage.ru_maxrss / 1024


def made(folder: Path, layers: int, experts: int) -> int:
    """Make a checkpoint in a process of its own: the ru_maxrss of a child starts at its parent's size."""
    code = f"from made import *; print(make_qwen3_moe(Path({str(folder)!r}), layers={layers}, experts={experts}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, check=True)
    return int(done.stdout)


def main() -> None:
    rows = []
    for layers, experts in CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            size = made(folder / "model", layers, experts)
            model, calibration = str(folder / "model"), ["--tokens", "2048", "--window", "256"]
            profiled = peak_mib(["profile", model, "-o", str(folder / "profile"), *calibration, *COMMON])
            plan = ["--profile", str(folder / "profile"), "--keep", "0.5"]
            pruned = peak_mib(["prune", model, *plan, "-o", str(folder / "pruned")])
            quantized = peak_mib(["quantize", model, "-o", str(folder / "quantized"), *calibration, *COMMON])
        rows.append(
            {
                "layers": layers,
                "experts": experts,
                "checkpoint_mib": size / 2**20,
                "profile_mib": profiled,
                "prune_mib": pruned,
                "quantize_mib": quantized,
            }
        )
        print(
            f"{layers:3d} layers x {experts:3d} experts, {size / 2**20:6.0f} MiB: peak RSS profile {profiled:5.0f}, "
            f"prune {pruned:5.0f}, quantize {quantized:5.0f} MiB",
            flush=True,
        )
    slopes = {}
    for stage in ("profile", "prune", "quantize"):
        for axis, chosen in (
            ("layers", [r for r in rows if r["experts"] == 16]),
            ("experts", [r for r in rows if r["layers"] == 8]),
        ):
            x = [r[axis] for r in chosen]
            slope = float(np.polyfit(x, [r[f"{stage}_mib"] for r in chosen], 1)[0])
            weights = float(np.polyfit(x, [r["checkpoint_mib"] for r in chosen], 1)[0])
            slopes[f"{stage} per {axis[:-1]}"] = slope
            print(
                f"{stage}: {slope:+.2f} MiB per {axis[:-1]} (the checkpoint grows by {weights:.2f} MiB per {axis[:-1]})"
            )
    save("memory", rows, slopes_mib=slopes)


if __name__ == "__main__":
    main()
