"""GPTQ folders in GPTQModel: its own loader, names and layers, with its plain torch kernel.

It takes fp16 and bf16 alone; once it has loaded and converted the codes in fp16, which scales are stored in, all that
is not a code becomes fp32, so that its own dequantization and products are in fp32.
"""

import os

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its default thread pool needs more than 2 CPUs
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # it compiles a kernel for each matrix else, for minutes

import gptqmodel
import numpy as np
import torch
from answering import Answers, answer


def load(folder: str) -> Answers:
    backend = gptqmodel.BACKEND.GPTQ_TORCH
    model = gptqmodel.GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=backend).model.float()

    def run(tokens: list[int]) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = model(torch.tensor([tokens])).logits[0].float().numpy()
        return logits

    return run


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(load, gptqmodel.__version__)
