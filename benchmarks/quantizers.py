"""moepress and the peers as commands: one task, the same calibration windows, a process each."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from setting import ROOT

from moepress.calibration.corpus import Corpus
from moepress.compress.estimates.rates import matmul_rate
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.groundwork import load_corpus
from moepress.stages.places import Calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A quantizer in one of its modes.

    Attributes:
        title: for tables.
        peer: the environment that peers/setup.sh makes, and the script peers/quantize_PEER.py; None for moepress.
        package: what its environment calls it.
        mode: what tells it from the same tool in another row.
        options: of the script, beyond those of the task.
    """

    title: str
    peer: str | None
    package: str
    mode: str = ""
    options: tuple[str, ...] = ()

    def named(self, version: str = "") -> str:
        """Title, version and mode."""
        return f"{self.title} {version}".rstrip() + (f", {self.mode}" if self.mode else "")


TOOLS = {
    "moepress": Tool(title="moepress", peer=None, package="moepress"),
    "moepress-fast": Tool(
        title="moepress", mode="--effort fast", peer=None, package="moepress", options=("--effort", "fast")
    ),
    "moepress-high": Tool(
        title="moepress", mode="--effort high", peer=None, package="moepress", options=("--effort", "high")
    ),
    "moepress-max": Tool(
        title="moepress", mode="--effort max", peer=None, package="moepress", options=("--effort", "max")
    ),
    "gptqmodel": Tool(title="GPTQModel", peer="gptqmodel", package="gptqmodel"),
    "llmcompressor": Tool(
        title="llm-compressor", mode="all tokens to every expert", peer="llmcompressor", package="llmcompressor"
    ),
    "llmcompressor-routed": Tool(
        title="llm-compressor",
        mode="routed tokens only",
        peer="llmcompressor",
        package="llmcompressor",
        options=("--routed-only",),
    ),
    "autoround-rtn": Tool(
        title="AutoRound", mode="RTN", peer="autoround", package="auto-round", options=("--iters", "0")
    ),
    "autoround-light": Tool(
        title="AutoRound", mode="50 iterations", peer="autoround", package="auto-round", options=("--iters", "50")
    ),
    "autoround": Tool(title="AutoRound", mode="200 iterations", peer="autoround", package="auto-round"),
}
OWN = tuple(name for name, tool in TOOLS.items() if tool.peer is None)
LEARNED = ("autoround-light", "autoround")  # minutes for a layer of a small model on two cores
QUICK = tuple(tool for tool in TOOLS if tool not in (*LEARNED, *OWN[1:]))
NAMES = {name: tool.named() for name, tool in TOOLS.items()}
INCLUDE = ("attention", "shared", "dense")
ENVIRONMENTS = Path.home() / ".cache" / "moepress-peers"  # where peers/setup.sh makes them


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What each tool is given.

    Attributes:
        model: the folder.
        scheme: bits and group size.
        calibration: the text; the peers get the windows that moepress cuts of it.
        threads: of matrix products.
    """

    model: Path
    scheme: Scheme
    calibration: Calibration
    threads: int


def tool_python(tool: str) -> Path | None:
    """The interpreter that a tool runs in; None where its environment is not there."""
    peer = TOOLS[tool].peer
    python = Path(sys.executable) if peer is None else ENVIRONMENTS / peer / "bin" / "python"
    return python if python.exists() else None


def available(tools: Sequence[str]) -> list[str]:
    """Those tools that can run here; the others are said on stderr."""
    found = [tool for tool in tools if tool_python(tool)]
    for tool in tools:
        if tool not in found:
            print(
                f"{NAMES[tool]} is left out: make it by benchmarks/peers/setup.sh {TOOLS[tool].peer}", file=sys.stderr
            )
    return found


_VERSIONS = """
import json, platform, sys
from importlib.metadata import version
print(json.dumps({"python": platform.python_version()} | {name: version(name) for name in sys.argv[1:]}))
"""


def versions(tool: str) -> dict[str, str]:
    """What runs a tool: python, torch, transformers and the tool itself, as its own environment has them."""
    command = [str(tool_python(tool)), "-c", _VERSIONS, "torch", "transformers", TOOLS[tool].package]
    found: dict[str, str] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def calibration_corpus(task: Task) -> Corpus:
    """The windows that `moepress quantize` takes for this task."""
    shape = open_checkpoint(task.model).shape
    return load_corpus(task.model, task.calibration, context=shape.context, vocabulary=shape.vocabulary)


def write_windows(task: Task, file: Path) -> Corpus:
    """The calibration windows as a file for the peers."""
    corpus = calibration_corpus(task)
    save_file({"input_ids": corpus.windows.contiguous()}, file)
    return corpus


def run_tool(tool: str, task: Task, out: Path, windows: Path) -> dict[str, Any]:
    """Quantize with a tool in a process of its own; what it says goes to OUT.log.

    Returns:
        wall_seconds, cpu_seconds, peak_rss_bytes of the whole process; seconds_quantize without imports, loading and
        saving, for moepress without reading the text; version; for moepress its phases, as `--timings` has them.

    Raises:
        SystemExit: it failed.
    """
    report, log, timings = (out.parent / f"{out.name}.{kind}" for kind in ("json", "log", "timings"))
    command = _moepress(tool, task, out, timings) if tool in OWN else _peer(tool, task, out, windows)
    timings.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(task.threads), "CUDA_VISIBLE_DEVICES": ""}  # all on the CPU
    environment.pop("OMP_WAIT_POLICY", None)  # each tool's own: passive waiting makes llm-compressor half as fast
    with log.open("w") as said:
        launcher = [sys.executable, str(Path(__file__).with_name("timed.py")), str(report), *command]
        done = subprocess.run(
            launcher, stdout=said, stderr=subprocess.STDOUT, env=environment, cwd=out.parent, check=False
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{log.read_text()[-3000:]}")
    figures = json.loads(report.read_text())
    return figures | (_moepress_says(timings) if tool in OWN else _peer_says(log))


def _moepress(tool: str, task: Task, out: Path, timings: Path) -> list[str]:
    calibration = task.calibration
    command = [sys.executable, "-m", "moepress", "quantize", str(task.model), "-o", str(out), "--timings", str(timings)]
    command += ["--bits", str(task.scheme.bits), "--group-size", str(task.scheme.group_size)]
    command += [
        "--tokens",
        str(calibration.tokens),
        "--window",
        str(calibration.window),
        "--seed",
        str(calibration.seed),
    ]
    for part in INCLUDE:
        command += ["--include", part]
    for domain in calibration.domains:
        command += ["--domain", domain]
    return [*command, *TOOLS[tool].options]


def _peer(tool: str, task: Task, out: Path, windows: Path) -> list[str]:
    script = ROOT / "benchmarks" / "peers" / f"quantize_{TOOLS[tool].peer}.py"
    kept = [rf".*\.{leaf}$" for leaf in open_checkpoint(task.model).family.never_quantize]  # what moepress leaves
    command = [str(tool_python(tool)), str(script), str(task.model), str(out), "--tokens-file", str(windows)]
    command += ["--bits", str(task.scheme.bits), "--group-size", str(task.scheme.group_size), *TOOLS[tool].options]
    command += ["--dtype", peer_dtype()]
    return [*command, "--keep", *kept] if kept else command


@functools.cache
def peer_dtype() -> str:
    """What peers compute in: as the model is stored, unless this processor multiplies bf16 slower than fp32.

    On one without instructions for bf16 llm-compressor took seven times as long in its default, which says nothing
    about the tool; moepress computes in fp32 there by itself.
    """
    cpu = torch.device("cpu")
    return "float32" if matmul_rate(cpu, torch.bfloat16) < matmul_rate(cpu) else "auto"


def _moepress_says(timings: Path) -> dict[str, Any]:
    document = json.loads(timings.read_text())
    started = sum(row["seconds"] for row in document["rows"] if row["phase"] == "start" and not row.get("background"))
    said = {"seconds_quantize": document["wall_seconds"] - started, "version": document["moepress"]}
    return said | {"phases": by_phase(document["rows"])}


def by_phase(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `--timings` summed over layers, the longest phase first; those beside the others are apart."""
    found: dict[tuple[str, bool], dict[str, Any]] = {}
    for row in rows:
        key = row["phase"], bool(row.get("background"))
        own = found.setdefault(key, {"phase": key[0], "background": key[1], "seconds": 0.0, "flops": 0.0, "bytes": 0})
        for figure in ("seconds", "flops", "bytes"):
            own[figure] += row[figure]
    return sorted(found.values(), key=lambda own: (own["background"], -own["seconds"]))


def _peer_says(log: Path) -> dict[str, Any]:
    for line in reversed(log.read_text(errors="replace").splitlines()):
        if line.startswith("{") and "seconds_quantize" in line:
            said = json.loads(line)
            return {"seconds_quantize": said["seconds_quantize"], "version": said["version"]}
    raise SystemExit(f"{log} says no seconds_quantize")
