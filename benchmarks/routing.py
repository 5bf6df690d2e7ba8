"""How many tokens choose other experts after quantizing at 4, 3 and 2 bits, with the default options.

    python benchmarks/routing.py [--bits 4 3 2] [--tokens N] [--work FOLDER]

`moepress quantize` on N tokens of the train texts (without --tokens on as many as it takes itself), seed 0; then
`moepress validate` against the original on 12 windows of 512 tokens per domain of the test texts. Folders that a former
call quantized into FOLDER are taken as they are. Without ../shared the demo model and its embedded text are used.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from setting import bench_model, save, texts

from moepress.validation.report.schema import Report


def moepress(*arguments: object) -> None:
    """A command, as a user types it."""
    subprocess.run([sys.executable, "-m", "moepress", *map(str, arguments), "--quiet"], check=True)


def report_of(bits: int, tokens: int | None, work: Path) -> Report:
    """The model at so many bits against the original."""
    pressed, report = work / f"q{bits}", work / f"r{bits}"
    if not pressed.is_dir():
        train = [word for text in texts("train") for word in ("--domain", text)]
        train += [] if tokens is None else ["--tokens", str(tokens)]
        moepress("quantize", bench_model(), "--bits", bits, "--seed", 0, *train, "-o", pressed)
    test = [word for text in texts("test") for word in ("--data-domain", text)]
    compared = (bench_model(), pressed, *test, "--max-windows", 12, "--no-throughput", "-o", report)
    moepress("validate", *compared)
    return Report.model_validate_json((report / "report.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for bits in arguments.bits:
            report = report_of(bits, arguments.tokens, arguments.work or Path(temporary))
            paired = report.overall("after").paired
            assert paired is not None
            for found in report.quality.routing:
                shares = {"changed": found.changed.value, "error": found.changed.error, "common": found.common}
                rows.append({"bits": bits, "layer": found.layer, "tokens": found.tokens, **shares})
                layer = "mean" if found.layer is None else f"layer {found.layer}"
                print(f"{bits} bits, {layer}: {found.changed.value:.2%} of the tokens, {found.common:.2%} alike")
            rows[-1] |= {"kl": paired.kl.value, "same_top1": paired.same_top1.value}
            print(f"{bits} bits: KL {paired.kl.value:.5f}, same top-1 {paired.same_top1.value:.2%}")
    save("routing", rows, seed=0, calibration_tokens=arguments.tokens)


if __name__ == "__main__":
    main()
