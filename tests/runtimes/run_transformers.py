"""Folders in transformers, computed in fp32.

Whatever `dtype` is asked for, experts that come from codes are products in the scales' dtype, and computed in it; once
they are loaded all becomes fp32, so that what shows is the rounding of the weights alone.
"""

import numpy as np
import torch
import transformers
from answering import Answers, answer


def load(folder: str) -> Answers:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.float()

    def run(tokens: list[int]) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = model(torch.tensor([tokens])).logits[0].float().numpy()
        return logits

    return run


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    answer(load, transformers.__version__)
