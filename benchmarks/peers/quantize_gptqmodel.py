"""Quantize a model with GPTQModel. Run it with that peer's python (see setup.sh); nothing of moepress is needed.

    PEER_PYTHON benchmarks/peers/quantize_gptqmodel.py MODEL OUT --bits 4 --group-size 64 --tokens-file WINDOWS

WINDOWS is a safetensors file with `input_ids`, int64 [windows, tokens]. Every Linear of the decoder layers is quantized
but routers and what --keep names (regular expressions); all other settings are GPTQModel's own defaults. The last
line is JSON: seconds_quantize (its `quantize` alone), seconds_total (with imports, loading and saving), peak_rss_bytes,
version.
"""

import json
import os
import resource
import time

from quantize_options import parser_of


def main() -> None:
    start = time.perf_counter()
    parser = parser_of(__doc__)
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
    model = GPTQModel.load(str(options.model), config, **({} if options.dtype == "auto" else {"dtype": options.dtype}))
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
