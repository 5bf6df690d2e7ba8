"""A GGUF file as a candidate for timing, in llama.cpp on the CPU: its prompt in one batch, then token by token."""

import torch

from moepress.converters.gguf.file import GgufModel
from moepress.converters.gguf.runtime import llama_version
from moepress.models.forward.dense import free_memory_bytes
from moepress.validation.quality.llama_cpp import LlamaSession, open_llama
from moepress.validation.speed.timing import Bench, Candidate, Loaded, lengths, random_prompt

_NOTE = "8-bit activations"


def llama_candidate(label: str, model: GgufModel, bench: Bench) -> Candidate:
    """The file in llama.cpp, with as many threads as torch has."""
    free, obstacle = free_memory_bytes(torch.device("cpu")), None
    if model.total_bytes > free:
        obstacle = f"needs {model.total_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return Candidate(
        subject=label,
        runtime=f"llama.cpp {llama_version()}",
        provider="CPU",
        dtype="float32",
        memory=("cpu", model.total_bytes),
        load=lambda: _loaded(model, bench),
        obstacle=obstacle,
    )


def _loaded(model: GgufModel, bench: Bench) -> Loaded:
    prompt, decode = lengths(model.context, bench.prompt, bench.decode)
    session = open_llama(model.file, context=max(prompt, decode))
    tokens = random_prompt(model.vocabulary, prompt)[0].tolist()
    return Loaded(
        provider="CPU",
        tests={
            f"pp{prompt}": (prompt, lambda: _run(session, tokens, 0)),
            f"tg{decode}": (decode, lambda: _run(session, tokens[:1], decode - 1)),
        },
        notes=(_NOTE,) if model.rounds_activations else (),
    )


def _run(session: LlamaSession, tokens: list[int], steps: int) -> None:
    session.clear()
    logits = session.logits(tokens, last=True)
    for _ in range(steps):
        logits = session.logits([int(logits.argmax())], last=True)
