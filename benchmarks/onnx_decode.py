"""Decode speed and memory of an ONNX export against transformers on the CPU.

    python benchmarks/onnx_decode.py [--models bench,made] [--rounds 5] [--tokens 128] [--threads 2] [--work DIR]

`bench` is the trained model (or the demo), quantized by moepress at 4 bits in groups of 64. `made` has random weights
in OLMoE's shape with two layers, rounded to 4 bits in groups of 32: speed does not depend on the codes. transformers
runs the original, in bf16 and in fp32; from a compressed-tensors folder it would make the same dense weights.

Every runtime is a process of its own with the same number of threads. All stay alive and decode in turn (A B C, A B C,
...), so that a slow moment of the machine hits all alike: after a short prompt, a number of tokens, one at a time,
batch 1, greedy, not stopping at an end of text. The first round is thrown away. A ratio is the geometric mean over
rounds of a runtime's speed by that of the faster transformers row, with its standard error. Needs about 16 GB of free
memory and 8 GB of disk for `made`; artifacts that are in --work already are used again.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from processes import Worker, memory_mib, serve

PROMPT = 16  # tokens
PAUSE_SECONDS = 0.2  # threads of the runtime before go on spinning for a while
NOISY = 1.25  # other work slows transformers more than ONNX Runtime, so it flatters the ratio
GOAL = 3.0  # times the faster transformers row
EXPORTS = tuple((kernel, level) for kernel in ("qmoe", "loop") for level in (0, 4))


def served(runtime: str, folder: Path, tokens: int, threads: int) -> Mapping[str, Callable[[], Any]]:
    """What a worker answers: `sample` in tokens per second, `memory` in MiB."""
    load = {"transformers": _transformers, "onnxruntime": _onnxruntime, "genai": _genai}[runtime.split()[0]]
    imported, decode = load(folder, runtime.split()[-1], tokens, threads)

    def sample() -> float:
        return tokens / decode()

    return {"sample": sample, "memory": lambda: memory_mib() | {"imported": imported}}


def _prompt(vocabulary: int) -> Any:
    import torch

    return torch.randint(3, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))


def _transformers(folder: Path, dtype: str, tokens: int, threads: int) -> tuple[float, Callable[[], float]]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    imported = memory_mib()["VmRSS"]
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, local_files_only=True).eval()
    prompt = _prompt(model.config.vocab_size)

    @torch.inference_mode()
    def decode() -> float:
        out = model(prompt, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(tokens):
            token = out.logits[:, -1].argmax(dim=-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - start

    return imported, decode


def _onnxruntime(folder: Path, _kind: str, tokens: int, threads: int) -> tuple[float, Callable[[], float]]:
    import torch

    from moepress.converters.onnx.folder import open_onnx
    from moepress.converters.onnx.runtime import require_onnxruntime
    from moepress.validation.quality.onnx_session import open_session
    from moepress.validation.speed.onnx_throughput import SharedDecoding

    torch.set_num_threads(threads)
    require_onnxruntime()
    imported = memory_mib()["VmRSS"]
    model = open_session(open_onnx(folder), "cpu", exact=False)
    prompt = _prompt(model.folder.vocabulary)

    def decode() -> float:
        decoding = SharedDecoding(model, PROMPT + tokens)
        logits = decoding.step(prompt)
        start = time.perf_counter()
        for _ in range(tokens):
            logits = decoding.step(logits[:, -1].argmax(dim=-1, keepdim=True))
        return time.perf_counter() - start

    return imported, decode


def _genai(folder: Path, _kind: str, tokens: int, threads: int) -> tuple[float, Callable[[], float]]:
    import json

    import numpy as np
    import onnxruntime_genai as genai

    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    prompt = _prompt(vocabulary)[0].numpy().astype(np.int32)
    imported = memory_mib()["VmRSS"]
    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)

    def decode() -> float:
        parameters = genai.GeneratorParams(model)
        length = len(prompt) + tokens + 1
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        generator.generate_next_token()  # from the prompt's logits: no step of the model
        start = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        seconds = time.perf_counter() - start
        assert generator.token_count() == length
        return seconds

    return imported, decode


def prepare(model: str, work: Path) -> tuple[Path, dict[str, Path]]:
    """The original folder, and its exports by kind; what is there already stays."""
    from setting import bench_model

    from moepress.converters.onnx.export import OnnxRequest
    from moepress.stages.export import onnx_stage
    from moepress.stages.places import Output

    if model == "bench":
        original, artifact = bench_model(), work / f"{bench_model().name}-4bit"
        if not artifact.is_dir():
            _quantize(original, artifact)
    else:
        original, artifact = work / "made", work / "made-4bit"
        if not artifact.is_dir():
            _make(original, artifact)
    exports = {}
    for kernel, level in EXPORTS:
        folder = work / f"{artifact.name}-{kernel}-{level}"
        if not folder.is_dir():
            request = OnnxRequest(kernel=kernel, accuracy_level=level)
            onnx_stage(str(artifact), Output(folder=folder), request, check=level == 0)
        exports[f"{kernel} level {level}"] = folder
    return original, exports


def _quantize(original: Path, artifact: Path) -> None:
    from made import INCLUDE
    from setting import texts

    from moepress.converters.safetensors.scheme import Scheme
    from moepress.stages.places import Calibration, Machine, Output
    from moepress.stages.quantize import QuantizeRequest, quantize_stage

    quantize_stage(
        str(original),
        Output(folder=artifact),
        None,
        QuantizeRequest(scheme=Scheme(bits=4, group_size=64), include=INCLUDE),
        Calibration(domains=texts("train"), tokens=16 * 512, window=512),
        Machine(),
    )


def _make(original: Path, artifact: Path) -> None:
    from made import make_olmoe, make_rounded

    from moepress.converters.safetensors.scheme import Scheme

    for folder, make in (
        (original, make_olmoe),
        (artifact, lambda part: make_rounded(original, part, Scheme(bits=4, group_size=32))),
    ):
        if not folder.is_dir():
            part = folder.with_suffix(".part")  # whole or not at all
            shutil.rmtree(part, ignore_errors=True)
            make(part)
            part.rename(folder)


def measure(
    model: str, original: Path, exports: Mapping[str, Path], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of one model, transformers first."""
    from moepress.converters.onnx.runtime import installed_version
    from moepress.validation.speed.throughput import paired_ratio

    folders = {"transformers bf16": original, "transformers fp32": original}
    folders |= {f"onnxruntime {kind}": folder for kind, folder in exports.items()}
    if installed_version("onnxruntime-genai") is None:
        print("onnxruntime-genai is not installed, so it has no rows.")
    else:
        folders |= {f"genai {kind}": folder for kind, folder in exports.items() if kind.startswith("qmoe")}
    common = ["--tokens", str(arguments.tokens), "--threads", str(arguments.threads)]
    workers = {
        label: Worker(__file__, ["--serve", label, "--folder", str(folder), *common])
        for label, folder in folders.items()
    }
    samples: dict[str, list[float]] = {label: [] for label in workers}
    for number in range(arguments.rounds + 1):
        for label, worker in workers.items():
            time.sleep(PAUSE_SECONDS)
            speed = worker.ask("sample")
            if number:  # the first one is the warm-up
                samples[label].append(speed)
    memory = {label: worker.ask("memory") for label, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    best = max(("transformers bf16", "transformers fp32"), key=lambda label: median(samples[label]))
    rows = []
    for label, taken in samples.items():
        ratio = paired_ratio(taken, samples[best])
        figures = {"median": median(taken), "samples": taken, "reference": best}
        against = {"ratio": ratio.value, "ratio_error": ratio.error}
        rows.append({"model": model, "runtime": label, **figures, **against, "memory_mib": memory[label]})
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Print one model's table and what it says about the goals; returns the ratios of the latter."""
    from moepress.validation.speed.throughput import paired_ratio

    model, best = rows[0]["model"], rows[0]["reference"]
    print(f"\n{model}: tokens/s as median (least to most), ratio to {best}; memory in MiB")
    for row in rows:
        memory, taken = row["memory_mib"], row["samples"]
        print(
            f"{row['runtime']:26s} {row['median']:8.2f} ({min(taken):.2f} to {max(taken):.2f})  "
            f"{row['ratio']:6.2f} +- {row['ratio_error'] or 0:.2f}   peak RSS {memory['VmHWM']:6.0f}, anonymous "
            f"{memory['RssAnon']:6.0f}, before loading {memory['imported']:5.0f}"
        )
    taken = {row["runtime"]: row["samples"] for row in rows}
    found = {}
    for level in (0, 4):
        ratio = paired_ratio(taken[f"onnxruntime qmoe level {level}"], taken[f"onnxruntime loop level {level}"])
        found[f"{model}: qmoe against loop, level {level}"] = ratio.value
        print(f"QMoE against loop, level {level}: {ratio.value:.2f} +- {ratio.error or 0:.2f}")
    noisy = [row["runtime"] for row in rows if max(row["samples"]) > NOISY * min(row["samples"])]
    if noisy:
        print(f"noisy, to be repeated on a quiet machine (samples {NOISY:g} x apart): {', '.join(noisy)}")
    fastest = max(rows, key=lambda row: row["ratio"])
    met = "met" if fastest["ratio"] >= GOAL else "missed"
    print(f"goal of {GOAL:g} x {best}: {met} by {fastest['runtime']} ({fastest['ratio']:.2f})", flush=True)
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="bench,made", help="bench, made, or both")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each runtime, at least 3")
    parser.add_argument("--tokens", type=int, default=128, help="decoded in a sample")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for artifacts, kept; a temporary one by default")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    if arguments.serve:
        serve(lambda: served(arguments.serve, arguments.folder, arguments.tokens, arguments.threads))
        return
    if arguments.rounds < 3:
        raise SystemExit("--rounds must be 3 or more: a ratio needs an error")
    unknown = set(arguments.models.split(",")) - {"bench", "made"}
    if unknown:
        raise SystemExit(f"--models: {', '.join(sorted(unknown))} is neither bench nor made")
    from setting import save

    rows, goals = [], {}
    with tempfile.TemporaryDirectory() as name:
        work = arguments.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        for model in arguments.models.split(","):
            original, exports = prepare(model, work)
            found = measure(model, original, exports, arguments)
            goals |= show(found)
            rows += found
    counts = {"tokens": arguments.tokens, "prompt": PROMPT, "rounds": arguments.rounds}
    save("onnx_decode", rows, **counts, decode_threads=arguments.threads, logical_cores=os.cpu_count(), ratios=goals)


if __name__ == "__main__":
    main()
