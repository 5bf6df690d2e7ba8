"""One pressed model in three runtimes: tokens per second of llama.cpp, ONNX Runtime and transformers, in one run.

    python benchmarks/gguf_speed.py [--model FOLDER] [--bits 4] [--threads 2]

The bench model (without ../shared the demo), 4 bits in groups of 32, attention and shared experts too, exported to
GGUF and ONNX. pp512 and tg128 as in llama-bench, the runtimes in turn, medians over ten.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from setting import RESULTS, bench_model, machine, texts

from moepress.compress.gptq.include import Include
from moepress.converters.gguf.export import GgufRequest
from moepress.converters.gguf.file import gguf_file, open_gguf
from moepress.converters.onnx.export import OnnxRequest
from moepress.converters.onnx.folder import open_onnx
from moepress.converters.safetensors.scheme import Scheme
from moepress.stages.export import gguf_stage, onnx_stage
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.quantize import QuantizeRequest, quantize_stage
from moepress.stages.subjects import elsewhere_subject, open_subject
from moepress.validation.speed.throughput import measure_throughput
from moepress.validation.speed.timing import Bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=bench_model())
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=RESULTS / "gguf_speed.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    calibration = Calibration(domains=texts("train"), tokens=64 * 256, window=256)
    request = QuantizeRequest(
        scheme=Scheme(bits=options.bits, group_size=32), include=frozenset({Include.ATTENTION, Include.SHARED})
    )
    with tempfile.TemporaryDirectory(prefix="gguf-speed-") as name:
        work = Path(name)
        machine_ = Machine(device="cpu", dtype="float32")
        quantize_stage(str(options.model), Output(folder=work / "pressed"), None, request, calibration, machine_)
        gguf_stage(str(work / "pressed"), Output(folder=work / "gguf"), GgufRequest())
        onnx_stage(str(work / "pressed"), Output(folder=work / "onnx"), OnnxRequest(), check=False)
        file = gguf_file(work / "gguf")
        assert file is not None
        subjects = [
            open_subject("pressed", work / "pressed"),
            elsewhere_subject("pressed, ONNX", open_onnx(work / "onnx")),
            elsewhere_subject("pressed, GGUF", open_gguf(file)),
        ]
        bench = Bench(device=torch.device("cpu"), dtype=torch.float32, onnx_device="cpu")
        found = measure_throughput(subjects, bench)
    print("| model | runtime | test | tokens/s | |\n|---|---|---|---:|---|")
    for row in found.rows:
        speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second.value:,.0f}"
        print(f"| {row.subject} | {row.runtime} | {row.test} | {speed} | {row.note or ''} |")
    rows = [row.model_dump(mode="json") if hasattr(row, "model_dump") else asdict(row) for row in found.rows]
    options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
