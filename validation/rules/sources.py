"""What rules were checked against: which release of a runtime, and whether it was run or its source was read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby

from moepress.validation.rules.findings import Runtime


class How(StrEnum):
    """How something is known of a runtime."""

    RAN = "ran"
    READ = "read"
    SAID = "said"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One release of a runtime.

    Attributes:
        runtime: whose; None of what is said of all.
        release: as documents call it, with its version.
        how: it was run on folders that break the rule, its source was read, or others say so.
        on: the day on which it was run, 2026-12-01, where a test does it again (tests/runtimes).
    """

    runtime: Runtime | None
    release: str
    how: How
    on: str = ""

    @property
    def text(self) -> str:
        """For people: ran with vLLM 0.32.0 on the CPU on 2026-12-01."""
        if self.how is How.SAID:
            return f"by {self.release}"
        if self.how is How.READ:
            return f"read in the source of {self.release}"
        return f"ran with {self.release}" + (f" on {self.on}" if self.on else "")


def _read(runtime: Runtime, release: str) -> Source:
    return Source(runtime=runtime, release=release, how=How.READ)


def _ran(runtime: Runtime, release: str, on: str = "") -> Source:
    return Source(runtime=runtime, release=release, how=How.RAN, on=on)


VLLM, SGLANG = _read(Runtime.VLLM, "vLLM 0.33"), _read(Runtime.SGLANG, "SGLang 0.5.23")
VLLM_RAN = _ran(Runtime.VLLM, "vLLM 0.32.0 on the CPU", "2026-12-01")
TRANSFORMERS = _ran(Runtime.TRANSFORMERS, "transformers 5.23")
GPTQMODEL = _ran(Runtime.GPTQMODEL, "GPTQModel 7.7")
GPTQMODEL_RAN = _ran(Runtime.GPTQMODEL, "GPTQModel 7.7.0", "2026-12-01")
AUTOGPTQ = _ran(Runtime.GPTQMODEL, "AutoGPTQ 0.7.1")
COMPRESSED = _ran(Runtime.TRANSFORMERS, "compressed-tensors 0.20")
MLX = _ran(Runtime.MLX, "mlx-lm 0.32.2", "2026-12-01")
LLAMA_CPP, LLAMA_CPP_RAN = _read(Runtime.LLAMA_CPP, "llama.cpp b11434"), _ran(Runtime.LLAMA_CPP, "llama.cpp b11549")
CONVERTER = _read(Runtime.LLAMA_CPP, "llama.cpp's converter")
ONNXRUNTIME = _ran(Runtime.ONNXRUNTIME, "ONNX Runtime 1.31 and 1.32 on the CPU")
GENAI = _ran(Runtime.ONNXRUNTIME, "onnxruntime-genai 0.18")


def said(release: str, *runtimes: Runtime) -> tuple[Source, ...]:
    """What was read elsewhere: documents, reports of bugs; of all runtimes where none are named."""
    return tuple(Source(runtime=runtime, release=release, how=How.SAID) for runtime in runtimes or (None,))


def source_for(sources: Sequence[Source], runtime: Runtime) -> str:
    """What is known of one runtime, in words; all there is where nothing is of it alone."""
    own = [source for source in sources if source.runtime is runtime]
    return "; ".join(dict.fromkeys(source.text for source in own or sources))


def summary(sources: Iterable[Source]) -> str:
    """All sources in a cell of a table: vLLM 0.33, SGLang 0.5.23 (read); transformers 5.23 (ran)."""
    parts = []
    for (how, on), same in groupby(sources, lambda source: (source.how, source.on)):
        names = ", ".join(dict.fromkeys(source.release for source in same))
        parts.append(names if how is How.SAID else f"{names} ({how}{f' {on}' if on else ''})")
    return "; ".join(parts)
