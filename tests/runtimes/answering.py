"""What every script here does: load folders in a runtime, and write what it answers to given tokens.

It runs in the runtime's own environment, so it needs nothing but numpy, and nothing of moepress.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

Answers = Callable[[list[int]], np.ndarray]


def answer(load: Callable[[str], Answers], version: str) -> None:
    """Work through the job whose file is the first argument.

    For each folder N.npz holds `log_probs`, fp32 [windows, tokens, vocabulary], or N.txt why there are none; the file
    `version` says what ran.

    Args:
        load: folder to a function, from token ids [T] to logits or log probabilities [T or T - 1, V].
        version: of the runtime.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    out = Path(job["out"])
    (out / "version").write_text(version)
    for number, folder in enumerate(job["folders"]):
        try:
            run = load(folder)
            rows = [_log_softmax(np.asarray(run(row), dtype=np.float64)) for row in job["tokens"]]
        except Exception as error:  # whatever it raises is its answer
            (out / f"{number}.txt").write_text(f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}")
            continue
        np.savez(out / f"{number}.npz", log_probs=np.stack(rows).astype(np.float32))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
