"""The GPTQ solver on a GPU: a layer's experts as one batch against one at a time, and its parts by themselves.

    python benchmarks/gptq_cuda.py                         # Qwen3-30B-A3B's layer: 128 experts of 2048 x 768
    python benchmarks/gptq_cuda.py --device cpu --small    # proves the script, and says nothing about a GPU

A layer is two solves: gate and up together (rows stacked, they share their input) and down. Weights and inputs are
made: inputs of a spectrum that falls off like a power, so that Hessians are as badly conditioned as real ones. Each
expert has as many tokens as 131,072 calibration tokens and top-8 give it on average. Hessians are not timed. Prints
seconds per layer, the ratio (the goal is 10), and how many codes differ between both ways.

Then, of each solve: the same batch with torch's loops in place of the kernels; every kernel on a block of columns
against its torch loop, with 16, 32, 64 and 128 rows a program; and Cholesky factors at once and one by one. Where there
are no kernels (a CPU outside of Triton's interpreter) torch's loops are timed alone. Without CUDA it says so and ends
with 5.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from setting import RESULTS

from moepress.compress.gptq import batch, columns, descent, factor, fused
from moepress.compress.gptq.columns import FUSED_LOOPS, PLAIN_LOOPS, Loops
from moepress.compress.gptq.grid import absmax_scales
from moepress.compress.gptq.levels import DEFAULT_SEARCH, Grid
from moepress.compress.gptq.options import SolverOptions, Task
from moepress.compress.gptq.solver import Solved, solve
from moepress.converters.safetensors.scheme import Scheme

# Columns and rows of the two solves, experts, tokens of each expert.
QWEN3_30B = {"gate and up": (2048, 2 * 768), "down": (768, 2048)}
SMALL = {"gate and up": (128, 2 * 64), "down": (64, 128)}


def made(experts: int, shape: tuple[int, int], tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [E, O, I] and Hessians [E, I, I]."""
    width, rows = shape
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.randn(experts, rows, width, generator=generator, device=device) * width**-0.5
    return weight, hessians(experts, width, tokens, device)


def hessians(experts: int, width: int, tokens: int, device: torch.device) -> torch.Tensor:
    """[E, I, I] fp32: mean of x x^T, one expert after the other so that inputs take little memory."""
    generator = torch.Generator(device).manual_seed(0)
    spectrum = torch.arange(1, width + 1, device=device).pow(-0.5)
    mixing = torch.randn(width, width, generator=generator, device=device) * width**-0.5
    found = torch.empty(experts, width, width, device=device)
    for expert in range(experts):
        inputs = torch.randn(tokens, width, generator=generator, device=device) * spectrum @ mixing
        torch.mm(inputs.T, inputs, out=found[expert])
    return found.div_(tokens)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, at_once: int) -> tuple[float, list[Solved]]:
    """Solve the experts, so many at a time."""
    wait(weight.device)
    start = time.perf_counter()
    parts = zip(weight.split(at_once), hessian.split(at_once), strict=True)
    solved = [solve(w, h, scheme, scale_dtype=torch.bfloat16) for w, h in parts]
    wait(weight.device)
    return time.perf_counter() - start, solved


def measure(weight: torch.Tensor, hessian: torch.Tensor, at_once: int, scheme: Scheme, repeat: int) -> dict[str, Any]:
    """One solve of the layer, in batches and one by one, in turn."""
    device = weight.device
    seconds_of(weight[:1], hessian[:1], scheme, 1)  # both ways once, so that libraries and kernels are loaded
    seconds_of(weight[:at_once], hessian[:at_once], scheme, at_once)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    batched, single = [], []
    for _ in range(repeat):
        seconds, together = seconds_of(weight, hessian, scheme, at_once)
        batched.append(seconds)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        seconds, alone = seconds_of(weight, hessian, scheme, 1)
        single.append(seconds)
    codes = torch.cat([s.codes for s in together])
    differ = (codes != torch.cat([s.codes for s in alone])).double().mean()
    return {
        "batched_seconds": batched,
        "one_by_one_seconds": single,
        "ratio": statistics.median(one / all_ for one, all_ in zip(single, batched, strict=True)),
        "peak_device_bytes": peak,
        "codes_that_differ": float(differ),
        "losses": [sum(float(s.loss.sum()) for s in way) for way in (together, alone)],
    }


def seconds_each(run: Callable[[], object], device: torch.device, repeat: int) -> float:
    """The median of some runs, after one that loads and compiles what it wants."""
    run()
    found = []
    for _ in range(repeat):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def kernels_there(device: torch.device) -> bool:
    return columns.inner_loops(device) is FUSED_LOOPS


def in_torch(weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, repeat: int) -> dict[str, float]:
    """Seconds of a batch in torch alone, by as many sweeps as the kernels make, and with them."""
    grid, group = Grid.of(scheme), scheme.columns_per_group(weight.shape[2])
    options = SolverOptions(sweeps=FUSED_LOOPS.sweeps)
    task = Task(grid=grid, group=group, dtype=torch.bfloat16, options=options)
    absmax = absmax_scales(weight, scheme, scale_dtype=torch.bfloat16)

    def seconds(loops: Loops) -> float:
        with patch.object(batch, "inner_loops", lambda _: loops), patch.object(descent, "inner_loops", lambda _: loops):
            run = lambda: batch.solve_batch(weight, hessian, absmax, task)  # noqa: E731
            return seconds_each(run, weight.device, repeat)

    found = {"torch": seconds(PLAIN_LOOPS)}
    return found | ({"kernels": seconds(FUSED_LOOPS)} if kernels_there(weight.device) else {})


def parts(weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, repeat: int) -> dict[str, dict[str, float]]:
    """Seconds of every kernel and its torch loop: two on a block of columns of all experts, the search on all."""
    device, grid = weight.device, Grid.of(scheme)
    group, width = scheme.columns_per_group(weight.shape[2]), min(fused.COLUMNS, weight.shape[2])
    turned = weight.mT.contiguous()
    importance = hessian.diagonal(dim1=1, dim2=2)
    scales = PLAIN_LOOPS.search_scales(turned, importance, grid, group, torch.bfloat16, DEFAULT_SEARCH)
    block, own = turned[:, :width], hessian[:, :width, :width].clone()
    own.diagonal(dim1=1, dim2=2).mul_(1.03)
    unit = torch.linalg.cholesky_ex(own)[0]
    unit = unit / unit.diagonal(dim1=1, dim2=2)[:, None]
    spread = scales.repeat_interleave(group, dim=1)[:, :width].contiguous()
    values, residual, errors, moves = (torch.empty_like(block) for _ in range(4))

    def timed(loops: Loops) -> dict[str, float]:
        def rounding() -> None:
            loops.round_columns(block.clone(), block, unit, spread, grid, values, residual, errors)

        def improving() -> None:
            loops.improve_columns(own, own @ residual, spread, grid, values, moves, FUSED_LOOPS.block_sweeps)

        def searching() -> None:
            loops.search_scales(turned, importance, grid, group, torch.bfloat16, DEFAULT_SEARCH)

        runs = {"round_columns": rounding, "improve_columns": improving, "search_scales": searching}
        return {name: seconds_each(run, device, repeat) for name, run in runs.items()}

    found = {"torch": timed(PLAIN_LOOPS)}
    if kernels_there(device):
        for rows in (16, 32, 64, 128):
            with patch.object(fused, "ROWS", rows):
                found[f"kernels, {rows} rows a program"] = timed(FUSED_LOOPS)
    return found


def factors(hessian: torch.Tensor, repeat: int) -> dict[str, float]:
    """Seconds of Cholesky factors both ways, for batches of 1 expert up to all."""
    damped, found = hessian.clone(), {}
    damped.diagonal(dim1=1, dim2=2).mul_(1.03)
    for count in sorted({1, 8, 32, len(hessian)} & set(range(len(hessian) + 1))):
        for way in (factor.at_once, factor.one_by_one):
            run = lambda way=way, some=damped[:count]: way(some)  # noqa: E731
            found[f"{count} {way.__name__}"] = seconds_each(run, hessian.device, repeat)
    return found


def _text(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {1000 * took:.2f} ms" for name, took in seconds.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="8 small experts")
    parser.add_argument("--experts", type=int, help="experts of the layer (default: 128, with --small 8)")
    parser.add_argument("--at-once", type=int, help="experts of a batch (default: all)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file (default: benchmarks/results/gptq_cuda.json on a GPU)")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device here; --device cpu --small tries the script.", file=sys.stderr)
        return 5
    experts = options.experts or (8 if options.small else 128)
    tokens = 256 if options.small else 131072 * 8 // 128
    scheme = Scheme(bits=options.bits, group_size=32 if options.small else 128)
    rows = []
    with torch.inference_mode():
        for name, shape in (SMALL if options.small else QWEN3_30B).items():
            at_once = min(options.at_once or experts, experts)
            weight, hessian = made(experts, shape, tokens, device)
            found = measure(weight, hessian, at_once, scheme, options.repeat)
            found["batch"] = in_torch(weight[:at_once], hessian[:at_once], scheme, options.repeat)
            found["parts"] = parts(weight[:at_once], hessian[:at_once], scheme, options.repeat)
            found["cholesky"] = factors(hessian[:at_once], options.repeat)
            rows.append({"solve": name, "columns": shape[0], "rows": shape[1], "at_once": at_once, **found})
            both = (statistics.median(found[key]) for key in ("batched_seconds", "one_by_one_seconds"))
            said = "batched {:.3f} s, one by one {:.3f} s".format(*both)
            print(f"{name}: {said}, {found['ratio']:.1f}x; {found['codes_that_differ']:.3%} of the codes differ")
            print(f"  a batch: {_text(found['batch'])}")
            for way, seconds in found["parts"].items():
                print(f"  {way}: {_text(seconds)}")
            print(f"  Cholesky: {_text(found['cholesky'])}")
    totals = [sum(statistics.median(row[key]) for row in rows) for key in ("batched_seconds", "one_by_one_seconds")]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"layer of {experts} experts on {where}: {totals[0]:.3f} s batched, {totals[1]:.3f} s one by one")
    file = options.json or (RESULTS / "gptq_cuda.json" if device.type == "cuda" and not options.small else None)
    if file:
        document = {"device": where, "torch": torch.__version__, "experts": experts, "tokens_of_an_expert": tokens}
        document |= {"bits": scheme.bits, "group_size": scheme.group_size, "layer_seconds": totals, "rows": rows}
        file.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
