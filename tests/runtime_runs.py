"""Runtimes, each asked in a process of its own: what they answer to folders that moepress wrote.

vLLM, GPTQModel and mlx-lm have environments of their own, which `tests/runtimes/environments.sh` makes; all others run
in the environment of the tests. Letters: N windows, T tokens of a window, V vocabulary.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

SCRIPTS = Path(__file__).with_name("runtimes")
ENVIRONMENTS = Path.home() / ".cache" / "moepress-runtimes"
PATIENCE_SECONDS = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """One runtime.

    Attributes:
        name: as documents call it.
        script: in tests/runtimes, which loads folders in it.
        words: further arguments of the script.
        environment: of `environments.sh`; None: that of the tests.
    """

    name: str
    script: str
    words: tuple[str, ...] = ()
    environment: str | None = None

    @property
    def python(self) -> Path | None:
        """The interpreter that has it; None where its environment was not made."""
        if self.environment is None:
            return Path(sys.executable)
        folder = ENVIRONMENTS / self.environment
        return folder / "bin" / "python" if (folder / "versions.txt").is_file() else None

    @property
    def how_to_make(self) -> str:
        """The command that makes its environment."""
        return f"{self.name} is not there; make it with: tests/runtimes/environments.sh {self.environment}"


RUNTIMES = {
    "transformers": Runtime(name="transformers", script="run_transformers.py"),
    "onnxruntime": Runtime(name="ONNX Runtime", script="run_onnxruntime.py"),
    "genai": Runtime(name="onnxruntime-genai", script="run_genai.py"),
    "llama.cpp": Runtime(name="llama.cpp", script="run_llama_cpp.py"),
    "mlx": Runtime(name="mlx-lm", script="run_mlx.py", environment="mlx"),
    "gptqmodel": Runtime(name="GPTQModel", script="run_gptqmodel.py", environment="gptqmodel"),
    "vllm": Runtime(name="vLLM", script="run_vllm.py", environment="vllm"),
    "vllm-untouched": Runtime(name="vLLM", script="run_vllm.py", words=("--untouched",), environment="vllm"),
}


def slow_where_there(runtime: Runtime) -> tuple[pytest.MarkDecorator, ...]:
    """The mark of tests in a runtime: slow where they would run; where they only skip they stay, to say why."""
    return () if runtime.python is None else (pytest.mark.slow,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a runtime said to a folder.

    Attributes:
        log_probs: fp32 [N, T - 1, V], of the tokens that follow each but the last; None where it refused.
        error: why it refused, with its own traceback.
    """

    log_probs: Tensor | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a runtime said to several folders, in their order, and its version."""

    version: str
    each: tuple[Answer, ...] = field(repr=False)


def ask(runtime: Runtime, folders: Sequence[Path], tokens_NT: Tensor, work: Path) -> Answers:
    """Load folders one after the other in a runtime.

    Args:
        runtime: one whose `python` is there.
        folders: or files, of GGUF.
        tokens_NT: int64, given to each.
        work: an empty folder for what it answers.
    """
    assert runtime.python is not None
    job = work / "job.json"
    job.write_text(json.dumps({"folders": [str(f) for f in folders], "tokens": tokens_NT.tolist(), "out": str(work)}))
    command = [str(runtime.python), str(SCRIPTS / runtime.script), str(job), *runtime.words]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, cwd=work, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    (work / "said.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, f"{runtime.script} ended with {done.returncode}: {done.stderr[-3000:]}"
    return Answers(
        version=(work / "version").read_text(),
        each=tuple(_read(work, number, tokens_NT.shape[1] - 1) for number in range(len(folders))),
    )


def _read(work: Path, number: int, length: int) -> Answer:
    if (work / f"{number}.txt").is_file():
        return Answer(error=(work / f"{number}.txt").read_text())
    with np.load(work / f"{number}.npz") as made:
        return Answer(log_probs=torch.from_numpy(made["log_probs"])[:, :length])
