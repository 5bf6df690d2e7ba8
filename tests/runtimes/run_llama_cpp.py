"""GGUF files in llama.cpp, through its C API as the package xllamacpp brings it; cache and activations in fp32."""

from pathlib import Path

import numpy as np
import torch
from answering import Answers, answer

from moepress.converters.gguf.runtime import llama_version
from moepress.validation.quality.llama_cpp import open_llama


def load(file: str) -> Answers:
    session = open_llama(Path(file), context=256, threads=1)

    def run(tokens: list[int]) -> np.ndarray:
        session.clear()
        return session.logits(tokens).numpy()

    return run


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(load, str(llama_version()))
