"""Quantize a model with AutoRound. Run it with that peer's python (see setup.sh); nothing of moepress is needed.

    PEER_PYTHON benchmarks/peers/quantize_autoround.py MODEL OUT --bits 4 --group-size 64 --tokens-file WINDOWS

WINDOWS is a safetensors file with `input_ids`, int64 [windows, tokens]. Every Linear of the decoder layers is
quantized, symmetrically, but routers and what --keep names (regular expressions). With `--iters 0` it rounds to
nearest, with scales that it searches by the squares of the inputs (but of routed experts); otherwise it learns the
rounding in so many steps per layer (200: its default; 50 is its own light recipe, with the learning rate that it
documents for that). All other settings are its defaults, 8 windows in one step among them. Written in the layout of
GPTQ. The last line is JSON: seconds_quantize (its `quantize` alone), seconds_total (with imports, loading and saving),
peak_rss_bytes, version.
"""

import json
import re
import resource
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from quantize_options import parser_of

LIGHT_ITERS, LIGHT_RATE = 50, 5e-3


def kept_modules(model: Path, patterns: Sequence[str]) -> str:
    """The modules that stay, as AutoRound wants them: their names with commas between, for it escapes patterns."""
    from safetensors import safe_open

    names = set[str]()
    for shard in model.glob("*.safetensors"):
        with safe_open(shard, "pt") as tensors:
            names |= {name.removesuffix(".weight") for name in tensors.keys()}  # noqa: SIM118 (not a dictionary)
    return ",".join(sorted(name for name in names if any(re.search(pattern, name) for pattern in patterns)))


def main() -> None:
    start = time.perf_counter()
    parser = parser_of(__doc__)
    parser.add_argument("--iters", type=int, default=200, help="steps of learning per layer; 0 rounds to nearest")
    options = parser.parse_args()

    from auto_round import AutoRound
    from safetensors.torch import load_file

    windows = load_file(options.tokens_file)["input_ids"]
    rate = {"lr": LIGHT_RATE} if options.iters == LIGHT_ITERS else {}
    work = AutoRound(
        str(options.model),
        scheme=f"W{options.bits}A16",
        group_size=options.group_size,
        sym=True,
        ignore_layers=kept_modules(options.model, options.keep),
        dataset=[{"input_ids": part} for part in windows.split(8)],
        nsamples=windows.shape[0],
        seqlen=windows.shape[1],
        iters=options.iters,
        device_map="cpu",
        **rate,
    )
    before = time.perf_counter()
    work.quantize()
    seconds = time.perf_counter() - before
    work.save_quantized(str(options.out), format="auto_gptq")
    figures = {
        "seconds_quantize": seconds,
        "seconds_total": time.perf_counter() - start,
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "version": version("auto-round"),
    }
    print("\n" + json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
