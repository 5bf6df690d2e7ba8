"""Folders in vLLM on the CPU, in fp32: its engine, loader, names and layers, with dense arithmetic for codes.

See `vllm_dense`. `--untouched` as a second argument leaves vLLM as it is.
"""

import gc
import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where vllm_dense can reach it
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "KMP_BLOCKTIME": "0",
    "OMP_NUM_THREADS": "1",
}

import numpy as np
import vllm
import vllm_dense
from answering import Answers, answer
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

_engines: list[vllm.LLM] = []


def load(folder: str) -> Answers:
    while _engines:  # one at a time: the engine is in this process
        _engines.pop()
        gc.collect()
        cleanup_dist_env_and_memory()
    config = json.loads((Path(folder) / "config.json").read_text())
    touched = "quantization_config" in config and "--untouched" not in sys.argv
    more = {"moe_backend": vllm_dense.BACKEND} if touched else {}
    _engines.append(
        vllm.LLM(
            model=folder,
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=1,
            max_num_batched_tokens=128,
            max_logprobs=-1,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            seed=0,
            **more,
        )
    )
    every = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)

    def run(tokens: list[int]) -> np.ndarray:
        (made,) = _engines[-1].generate([{"prompt_token_ids": tokens}], every, use_tqdm=False)
        rows = made.prompt_logprobs[1:]  # each position is told by those before it
        return np.array([[row[token].logprob for token in range(len(row))] for row in rows])

    return run


if __name__ == "__main__":
    if "--untouched" not in sys.argv:
        vllm_dense.install()
    answer(load, vllm.__version__)
