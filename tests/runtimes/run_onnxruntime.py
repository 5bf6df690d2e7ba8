"""ONNX folders in ONNX Runtime on the CPU, a window at once, with fp32 activations in all kernels."""

import os
from pathlib import Path

import numpy as np
import onnxruntime
from answering import Answers, answer


def load(folder: str) -> Answers:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(Path(folder) / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )

    def run(tokens: list[int]) -> np.ndarray:
        feed = {}
        for value in session.get_inputs():
            if value.name == "input_ids":
                feed[value.name] = np.array([tokens], dtype=np.int64)
            elif value.name == "attention_mask":
                feed[value.name] = np.ones((1, len(tokens)), dtype=np.int64)
            elif value.name == "position_ids":
                feed[value.name] = np.arange(len(tokens), dtype=np.int64)[None]
            else:  # an empty cache [1, heads, 0, size]
                feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), dtype=np.float32)
        logits: np.ndarray = session.run(["logits"], feed)[0][0]
        return logits

    return run


if __name__ == "__main__":
    os.environ["ORT_QMOE_CPU_QNBIT_GEMM"] = "0"  # or 8-bit experts round their activations to int8
    answer(load, onnxruntime.__version__)
