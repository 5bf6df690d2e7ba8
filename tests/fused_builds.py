"""Builds the Triton kernels for NVIDIA's cards, for which none is needed: `python fused_builds.py`.

Triton's interpreter takes much that its compiler does not. Prints a line of JSON for each build: its name, registers
that did not suffice, and divisions that are not IEEE's.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as build

from moepress.compress.gptq import fused, kernels

POINTERS = (
    *("target", "weight", "unit", "scales", "values", "residual", "errors", "levels", "hessian", "slope", "moves"),
    *("importance", "out", "shares"),
)
FLOATS = ("low", "high", "smallest", "largest")
COLUMNS = {"B": fused.COLUMNS, "R": fused.ROWS}
KERNELS = {
    "round_columns": COLUMNS,
    "improve_columns": COLUMNS,
    "search_scales": {"KIND": 1, "EITHER": True, "C": 64, "R": fused.ROWS},
}


def built(name: str, capability: int, steps: int) -> dict[str, object]:
    """What became of a kernel for a card of that compute capability."""
    kernel, fixed = getattr(kernels, name), {"STEPS": steps, **KERNELS[name]}
    types = {
        argument: "constexpr" if argument in fixed else "*fp32" if argument in POINTERS
        else "fp32" if argument in FLOATS else "i32"
        for argument in kernel.arg_names
    }  # fmt: skip
    source = ASTSource(fn=kernel, signature=types, constexprs=fixed)
    assembly = build(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(assembly)
        assembler = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
        architecture = re.search(r"\.target (\w+)", assembly)
        assert architecture is not None
        done = subprocess.run(
            [assembler, "-v", f"-arch={architecture[1]}", file, "-o", Path(folder) / "out"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    return {
        "name": f"{name}, {steps} steps, capability {capability}",
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr))),
        "registers": int(re.findall(r"Used (\d+) registers", done.stderr)[0]),
        "divisions": sorted(set(re.findall(r"\bdiv\.\S+", assembly))),
    }


if __name__ == "__main__":
    for kernel_name in KERNELS:
        for capability_and_steps in ((80, 0), (90, 4)):
            print(json.dumps(built(kernel_name, *capability_and_steps)), flush=True)
