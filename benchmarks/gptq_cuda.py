"""The GPTQ solver on a GPU: all experts of a layer as one batch against one expert at a time.

    python benchmarks/gptq_cuda.py                         # Qwen3-30B-A3B's layer: 128 experts of 2048 x 768
    python benchmarks/gptq_cuda.py --device cpu --small    # proves the script, and says nothing about a GPU

A layer is two solves: gate and up together (rows stacked, they share their input) and down. Weights and inputs are
made: inputs of a spectrum that falls off like a power, so that Hessians are as badly conditioned as real ones. Each
expert has as many tokens as 131,072 calibration tokens and top-8 give it on average. Hessians are not timed. Prints
seconds per layer, the ratio, and how many codes differ between both ways. Without CUDA it says so and ends with 5.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from setting import RESULTS

from moepress.compress.gptq.solver import Solved, solve
from moepress.converters.safetensors.scheme import Scheme

# Columns and rows of the two solves, experts, tokens of each expert.
QWEN3_30B = {"gate and up": (2048, 2 * 768), "down": (768, 2048)}
SMALL = {"gate and up": (128, 2 * 64), "down": (64, 128)}


def hessians(experts: int, columns: int, tokens: int, device: torch.device) -> torch.Tensor:
    """[E, I, I] fp32: mean of x x^T, one expert after the other so that inputs take little memory."""
    generator = torch.Generator(device).manual_seed(0)
    spectrum = torch.arange(1, columns + 1, device=device).pow(-0.5)
    mixing = torch.randn(columns, columns, generator=generator, device=device) * columns**-0.5
    found = torch.empty(experts, columns, columns, device=device)
    for expert in range(experts):
        inputs = torch.randn(tokens, columns, generator=generator, device=device) * spectrum @ mixing
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


def measure(
    shape: tuple[int, int], experts: int, at_once: int, tokens: int, scheme: Scheme, device: torch.device, repeat: int
) -> dict[str, Any]:
    """One solve of the layer, in batches and one by one, in turn."""
    columns, rows = shape
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.randn(experts, rows, columns, generator=generator, device=device) * columns**-0.5
    hessian = hessians(experts, columns, tokens, device)
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
            found = measure(shape, experts, at_once, tokens, scheme, device, options.repeat)
            rows.append({"solve": name, "columns": shape[0], "rows": shape[1], "at_once": at_once, **found})
            both = (statistics.median(found[key]) for key in ("batched_seconds", "one_by_one_seconds"))
            said = "batched {:.3f} s, one by one {:.3f} s".format(*both)
            print(f"{name}: {said}, {found['ratio']:.1f}x; {found['codes_that_differ']:.3%} of the codes differ")
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
