"""ONNX folders as candidates for timing: in ONNX Runtime, and in onnxruntime-genai where that is installed.

In ONNX Runtime the cache lies in buffers of full length that are past and present at once, as onnxruntime-genai does
it, so that no step copies it.
"""

import importlib
import importlib.util
import json
from types import ModuleType
from typing import Any

import numpy as np
import torch

from moepress.converters.onnx.folder import MODEL, OnnxFolder, read_model
from moepress.converters.onnx.runtime import CPU_PROVIDER, require_onnxruntime, session_providers
from moepress.models.forward.dense import free_memory_bytes
from moepress.validation.quality.onnx_session import CUDA_PROVIDER, Decoding, OnnxModel, open_session
from moepress.validation.speed.timing import Bench, Candidate, Loaded, first_line, lengths, random_prompt

GENAI = "onnxruntime_genai"
INT8_NOTE = "int8 activations"
_GROWING_NOTE = "the cache is copied at each step, for the graph has no GroupQueryAttention"


def onnx_candidates(label: str, folder: OnnxFolder, bench: Bench) -> list[Candidate]:
    """A folder in each runtime on each provider: the CPU always, CUDA where a session really gets it."""
    name = f"ONNX Runtime {require_onnxruntime().__version__}"
    providers = ["CPU", *(["CUDA"] if _gets_cuda(folder, bench.onnx_device) else [])]
    made = [
        _candidate(label, folder, name, provider, lambda p: _in_session(folder, p, bench)) for provider in providers
    ]
    if importlib.util.find_spec(GENAI) is None:
        return made
    try:
        genai = importlib.import_module(GENAI)
    except Exception as error:  # a wheel without its libraries fails in any way
        refused = f"onnxruntime-genai does not import ({first_line(error)})"
        return [*made, _candidate(label, folder, "onnxruntime-genai", "CPU", _never, refused)]
    name = f"onnxruntime-genai {genai.__version__}"
    made += [
        _candidate(label, folder, name, provider, lambda p: _in_genai(genai, folder, p, bench))
        for provider in providers
    ]
    return made


def _candidate(
    label: str, folder: OnnxFolder, runtime: str, provider: str, load: Any, obstacle: str | None = None
) -> Candidate:
    memory = "cuda" if provider == "CUDA" and torch.cuda.is_available() else "cpu"
    free = free_memory_bytes(torch.device(memory))
    if folder.total_bytes > free:
        obstacle = f"needs {folder.total_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return Candidate(
        subject=label,
        runtime=runtime,
        provider=provider,
        dtype=folder.dtype,
        memory=(memory, folder.total_bytes),
        load=lambda: load(provider),
        obstacle=obstacle,
    )


def _never(_provider: str) -> Loaded:
    raise AssertionError("it has an obstacle")


def _gets_cuda(folder: OnnxFolder, device: str) -> bool:
    """Whether to try CUDA: with an fp16 graph, when asked for by name or when a session of a tiny model gets it.

    Of an fp32 graph most nodes would run on the CPU and be reported as CUDA.
    """
    if folder.dtype == "float32":
        return False
    if device.startswith("cuda"):
        return True
    if device != "auto" or CUDA_PROVIDER not in require_onnxruntime().get_available_providers():
        return False
    return CUDA_PROVIDER in session_providers(CUDA_PROVIDER)


def int8_activations(folder: OnnxFolder) -> bool:
    """Whether ONNX Runtime's defaults round activations to int8 on the CPU: asked for, or all that its kernels do."""
    widths = folder.summary.get("experts_bits", {}).values() if folder.summary.get("kernel") == "qmoe" else ()
    return folder.int8_activations or any(bits in (2, 8) for bits in widths)


def _in_session(folder: OnnxFolder, provider: str, bench: Bench) -> Loaded:
    model = open_session(folder, provider.lower(), exact=False)
    prompt, decode = lengths(folder.context, bench.prompt, bench.decode)
    shared = shares_cache(folder)
    tokens = random_prompt(folder.vocabulary, prompt)
    notes = [INT8_NOTE] if int8_activations(folder) and model.providers[0] == CPU_PROVIDER else []
    return Loaded(
        provider=model.provider,
        tests={
            f"pp{prompt}": (prompt, lambda: _run(model, tokens, 0, shared=shared)),
            f"tg{decode}": (decode, lambda: _run(model, tokens[:, :1], decode - 1, shared=shared)),
        },
        notes=(*notes, *([] if shared else [_GROWING_NOTE])),
    )


def _run(model: OnnxModel, tokens_1S: torch.Tensor, steps: int, *, shared: bool) -> None:
    length = tokens_1S.shape[1] + steps
    decoding = SharedDecoding(model, length) if shared else Decoding(model)
    logits = decoding.step(tokens_1S)
    for _ in range(steps):
        logits = decoding.step(logits[:, -1].argmax(dim=-1, keepdim=True))


def shares_cache(folder: OnnxFolder) -> bool:
    """Whether past and present may be the same buffer, as GroupQueryAttention allows."""
    graph = read_model(folder.folder / MODEL).graph
    return any(node.op_type == "GroupQueryAttention" for node in graph.node)


class SharedDecoding:
    """One sequence in the making, in a cache of fixed length that is written in place.

    Args:
        model: whose graph `shares_cache`.
        length: tokens that the sequence may have.
    """

    def __init__(self, model: OnnxModel, length: int) -> None:
        values = require_onnxruntime().OrtValue
        self.model, self.length = model, 0
        self._binding = model.session.io_binding()
        self._binding.bind_output("logits", "cpu")  # the first of the outputs
        dtype = np.float32 if model.folder.dtype == "float32" else np.float16
        for layer, (heads, size) in enumerate(model.folder.caches):
            for part in ("key", "value"):
                empty = np.zeros((1, heads, length, size), dtype=dtype)
                buffer = values.ortvalue_from_numpy(empty, model.provider.lower(), model.number)
                self._binding.bind_ortvalue_input(f"past_key_values.{layer}.{part}", buffer)
                self._binding.bind_ortvalue_output(f"present.{layer}.{part}", buffer)

    def step(self, tokens_1S: torch.Tensor) -> torch.Tensor:
        """Logits [1, S, V] of the tokens given, int64 [1, S], in the graph's dtype."""
        given = tokens_1S.shape[1]
        self.length += given
        self._binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens_1S.numpy()))
        self._binding.bind_cpu_input("attention_mask", np.ones((1, self.length), dtype=np.int64))
        if "position_ids" in self.model.folder.inputs:
            positions = np.arange(self.length - given, self.length, dtype=np.int64)
            self._binding.bind_cpu_input("position_ids", positions[None])
        self._binding.bind_output("logits", "cpu")  # anew, for their number changes
        self.model.session.run_with_iobinding(self._binding)
        return torch.from_numpy(self._binding.get_outputs()[0].numpy())


def _in_genai(genai: ModuleType, folder: OnnxFolder, provider: str, bench: Bench) -> Loaded:
    config = genai.Config(str(folder.folder))
    config.clear_providers()  # none is the CPU
    if provider != "CPU":
        config.append_provider(provider.lower())
    options = {"intra_op_num_threads": torch.get_num_threads(), "session.force_spinning_stop": "1"}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = genai.Model(config)
    prompt, decode = lengths(folder.context, bench.prompt, bench.decode)
    tokens = random_prompt(folder.vocabulary, prompt)[0].numpy().astype(np.int32)
    return Loaded(
        provider=str(model.device_type),
        tests={
            f"pp{prompt}": (prompt, lambda: _genai_prefill(genai, model, tokens)),
            f"tg{decode}": (decode, lambda: _genai_decode(genai, model, tokens[:1], decode)),
        },
        notes=(INT8_NOTE,) if int8_activations(folder) and provider == "CPU" else (),
    )


def _genai_prefill(genai: ModuleType, model: Any, tokens: Any) -> None:
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(tokens) + 1, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(tokens)
    generator.get_logits()


def _genai_decode(genai: ModuleType, model: Any, tokens: Any, steps: int) -> None:
    parameters = genai.GeneratorParams(model)
    length = len(tokens) + steps
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)  # no end before that
    generator = genai.Generator(model, parameters)
    generator.append_tokens(tokens)
    for _ in range(steps):
        generator.generate_next_token()
