"""Folders in mlx-lm on the CPU; scales and what is not quantized are cast to fp32, codes stay."""

import importlib.metadata
from pathlib import Path

import mlx.core as mx
import numpy as np
from answering import Answers, answer
from mlx_lm.utils import load_model


def load(folder: str) -> Answers:
    model, _config = load_model(Path(folder), strict=True)
    model.set_dtype(mx.float32)

    def run(tokens: list[int]) -> np.ndarray:
        return np.array(model(mx.array([tokens]))[0].astype(mx.float32))

    return run


if __name__ == "__main__":
    answer(load, importlib.metadata.version("mlx-lm"))
