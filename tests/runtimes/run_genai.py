"""ONNX folders in onnxruntime-genai on the CPU: token by token, as it decodes, with its own cache."""

import importlib.metadata
import os

import numpy as np
import onnxruntime_genai as genai
from answering import Answers, answer


def load(folder: str) -> Answers:
    model = genai.Model(folder)

    def run(tokens: list[int]) -> np.ndarray:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=len(tokens) + 1)
        generator = genai.Generator(model, parameters)
        rows = []
        for token in tokens:
            generator.append_tokens(np.array([token], dtype=np.int32))
            rows.append(np.array(generator.get_logits(), dtype=np.float32).reshape(-1))
        return np.stack(rows)

    return run


if __name__ == "__main__":
    os.environ["ORT_QMOE_CPU_QNBIT_GEMM"] = "0"  # or 8-bit experts round their activations to int8
    answer(load, importlib.metadata.version("onnxruntime-genai"))
