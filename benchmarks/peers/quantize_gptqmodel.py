"""Quantize a model with GPTQModel. Run it with that peer's python (see setup.sh); nothing of moepress is needed.

    PEER_PYTHON benchmarks/peers/quantize_gptqmodel.py MODEL OUT --bits 4 --group-size 64 --tokens-file WINDOWS

WINDOWS is a safetensors file with `input_ids`, int64 [windows, tokens]. Every Linear of the decoder layers is quantized
but routers and what --keep names (regular expressions); all other settings are GPTQModel's own defaults. The last
line is JSON: seconds_quantize (its `quantize` alone), seconds_total (with imports, loading and saving), peak_rss_bytes,
version.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens-file", type=Path, required=True)
    parser.add_argument("--keep", nargs="*", default=[], help="regular expressions of modules that stay")
    parser.add_argument("--batch-size", type=int, default=1, help="windows in one forward (1: its default)")
    options = parser.parse_args()

    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default thread pool needs more than 2 CPUs
    import gptqmodel
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file

    windows = load_file(options.tokens_file)["input_ids"]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    dynamic = {f"-:{pattern}": {} for pattern in options.keep} or None
    config = QuantizeConfig(bits=options.bits, group_size=options.group_size, dynamic=dynamic, device="cpu")
    model = GPTQModel.load(str(options.model), config)
    before = time.perf_counter()
    model.quantize(rows, batch_size=options.batch_size)
    seconds = time.perf_counter() - before
    model.save(str(options.out))
    figures = {
        "seconds_quantize": seconds,
        "seconds_total": time.perf_counter() - start,
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "version": gptqmodel.__version__,
    }
    print("\n" + json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
