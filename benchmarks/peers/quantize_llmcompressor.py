"""Quantize a model with llm-compressor's GPTQ. Run it with that peer's python (see setup.sh); moepress is not needed.

    PEER_PYTHON benchmarks/peers/quantize_llmcompressor.py MODEL OUT --bits 4 --group-size 64 --tokens-file WINDOWS

WINDOWS is a safetensors file with `input_ids`, int64 [windows, tokens]. Every Linear is quantized, symmetrically, but
routers, lm_head and what --keep names (regular expressions); all other settings are llm-compressor's own defaults:
act-order static, damping 0.01, every token to every expert (`moe_calibrate_all_experts`), one window at a time. The
last line is JSON: seconds_quantize (its `oneshot` alone), seconds_total (with imports, loading and saving),
peak_rss_bytes, version.
"""

import json
import resource
import time
from importlib.metadata import version

from quantize_options import parser_of


def main() -> None:
    start = time.perf_counter()
    parser = parser_of(__doc__)
    parser.add_argument("--routed-only", action="store_true", help="to each expert its own tokens (not its default)")
    options = parser.parse_args()

    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows = load_file(options.tokens_file)["input_ids"]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    # oneshot makes Linears of experts
    model = AutoModelForCausalLM.from_pretrained(str(options.model), dtype=options.dtype)
    tokenizer = AutoTokenizer.from_pretrained(str(options.model))
    weights = QuantizationArgs(
        num_bits=options.bits, type="int", symmetric=True, strategy="group", group_size=options.group_size
    )
    ignored = ["lm_head", r"re:.*mlp\.gate$", *(f"re:{pattern}" for pattern in options.keep)]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    before = time.perf_counter()
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=ignored),
        max_seq_length=windows.shape[1],
        num_calibration_samples=windows.shape[0],
        moe_calibrate_all_experts=not options.routed_only,
    )
    seconds = time.perf_counter() - before
    model.save_pretrained(str(options.out), save_compressed=True)
    tokenizer.save_pretrained(str(options.out))
    figures = {
        "seconds_quantize": seconds,
        "seconds_total": time.perf_counter() - start,
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "version": version("llmcompressor"),
    }
    print("\n" + json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
