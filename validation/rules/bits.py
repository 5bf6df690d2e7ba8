"""Bits of routed experts that each runtime loads, so that a plan chooses no others.

vLLM and SGLang have kernels for experts of 4 and 8 bits; llama.cpp gets them as Q4_0 and Q8_0 by `export --to gguf`;
the others read all that `quantize` writes, or all that their export takes.
"""

from collections.abc import Mapping

from moepress.validation.rules.findings import Runtime

RUNTIME_BITS: Mapping[Runtime, tuple[int, ...]] = {
    Runtime.TRANSFORMERS: (2, 3, 4, 8),
    Runtime.VLLM: (4, 8),
    Runtime.SGLANG: (4, 8),
    Runtime.LLAMA_CPP: (4, 8),
    Runtime.ONNXRUNTIME: (2, 4, 8),
    Runtime.GPTQMODEL: (2, 3, 4, 8),
    Runtime.MLX: (2, 3, 4, 8),
}
USUAL = (Runtime.VLLM, Runtime.SGLANG, Runtime.LLAMA_CPP)
"""What people run on a GPU where they do not say otherwise."""


def bits_for(runtime: Runtime | None = None) -> tuple[int, ...]:
    """Bits that a runtime loads; without one those that all usual ones do."""
    if runtime is not None:
        return RUNTIME_BITS[runtime]
    return tuple(bits for bits in RUNTIME_BITS[USUAL[0]] if all(bits in RUNTIME_BITS[each] for each in USUAL))


def runtimes_of(bits: int) -> tuple[Runtime, ...]:
    """Those that load experts of so many bits."""
    return tuple(runtime for runtime, taken in RUNTIME_BITS.items() if bits in taken)
