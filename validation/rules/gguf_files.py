"""What llama.cpp does with a GGUF file: where it refuses one, ends the process over it, or computes something else.

Each function of `FILE_RULES` yields what it found; they look at metadata and the list of tensors alone. Source:
llama.cpp's `src/llama-model.cpp` and `src/llama-hparams.h` (b11434, read; b11549, tried by loading changed files).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from moepress.converters.gguf.architectures import MOST_EXPERTS, group_fault
from moepress.converters.gguf.file import GgufModel, open_gguf
from moepress.converters.gguf.runtime import require_llama
from moepress.converters.gguf.trial import require_survived
from moepress.errors import InvalidInputError
from moepress.validation.rules import sources
from moepress.validation.rules.findings import Effect, Problem, Runtime

_AGAIN = "export it again with `moepress export --to gguf`"
Look = Callable[[GgufModel], Iterator[Problem]]


def _problem(effect: Effect, what: str, happens: str, mend: str = _AGAIN) -> Problem:
    return Problem(what=what, happens={Runtime.LLAMA_CPP: (effect, happens)}, mend=mend)


def _whole(model: GgufModel, key: str) -> int | None:
    found = model.key(key)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def limits(model: GgufModel) -> Iterator[Problem]:
    """There are no more experts than there is room for, and as many as are used for a token."""
    used = _whole(model, "expert_used_count") or 0
    if model.experts > MOST_EXPERTS:
        yield _problem(Effect.REFUSES, f"{model.experts} experts in a layer", f"takes at most {MOST_EXPERTS}")
    if used > model.experts:
        yield _problem(Effect.REFUSES, f"{used} of {model.experts} experts are used for a token", "ends the process")


def groups(model: GgufModel) -> Iterator[Problem]:
    """Groups of experts are such as its assertions let pass."""
    count, used = _whole(model, "expert_group_count") or 0, _whole(model, "expert_group_used_count") or 0
    if count <= 1 or not model.experts:
        return
    fault = group_fault(model.experts, count, used)
    if fault is not None:
        yield _problem(Effect.REFUSES, fault, "ends the process", "prune to a count that divides, or without groups")


def equal_counts(model: GgufModel) -> Iterator[Problem]:
    """Every layer has as many experts as the file states."""
    for name, tensor in model.tensors.items():
        expected = 3 if name.endswith("_exps.weight") else 2 if name.endswith("ffn_gate_inp.weight") else 0
        if expected and (len(tensor.shape) != expected or tensor.shape[0] != model.experts):
            yield _problem(
                Effect.REFUSES,
                f"{name} is {list(tensor.shape)}, and the file states {model.experts} experts",
                "refuses it for its shape: one number counts for all layers",
                "plan with the same number of experts in every layer",
            )
            return


def whole_layers(model: GgufModel) -> Iterator[Problem]:
    """Every layer has its norm, and an MLP or experts."""
    for layer in range(_whole(model, "block_count") or 0):
        wanted = ["attn_norm.weight"]
        if f"blk.{layer}.ffn_gate_inp.weight" in model.tensors:
            wanted += [f"ffn_{leaf}_exps.weight" for leaf in ("up", "down")]
        missing = next((name for name in wanted if f"blk.{layer}.{name}" not in model.tensors), None)
        if missing is not None:
            yield _problem(Effect.REFUSES, f"blk.{layer}.{missing} is missing", "refuses it")
            return


def ranked_queries(model: GgufModel) -> Iterator[Problem]:
    """deepseek2 knows by the number of layers whether queries have a rank."""
    if model.architecture != "deepseek2":
        return
    layers, ranked = _whole(model, "block_count"), "blk.0.attn_q_a.weight" in model.tensors
    lite = layers in (26, 27) or (layers == 48 and model.vocabulary == 128_256)
    if lite and ranked:
        yield _problem(Effect.REFUSES, f"{layers} layers with attn_q_a", "looks for attn_q in models of so many layers")
    if not lite and not ranked:
        yield _problem(Effect.REFUSES, f"{layers} layers without attn_q_a", "wants q_lora_rank in all but 26 and 27")


def stated_gating(model: GgufModel) -> Iterator[Problem]:
    """A router with a correction bias says how it scores: softmax is assumed otherwise."""
    corrected = any(name.endswith("exp_probs_b.bias") for name in model.tensors)
    if model.architecture == "deepseek2" and corrected and _whole(model, "expert_gating_func") is None:
        yield _problem(
            Effect.WRONG, "expert_gating_func is not stated, beside a correction bias", "scores experts by softmax"
        )


def known_splitting(model: GgufModel) -> Iterator[Problem]:
    """Text is split as the model's own tokenizer does."""
    if model.keys.get("tokenizer.ggml.model") != "gpt2":
        return
    if model.keys.get("tokenizer.ggml.pre", "default") == "default":
        yield _problem(
            Effect.WRONG,
            "tokenizer.ggml.pre is not stated, or 'default'",
            "splits text otherwise than the model was trained on (2 to 14 % more tokens where tried)",
        )


_READ, _RAN = (sources.LLAMA_CPP,), (sources.LLAMA_CPP_RAN,)
FILE_RULES: dict[str, tuple[Look, tuple[sources.Source, ...]]] = {
    "gguf-limits": (limits, _READ),
    "gguf-groups": (groups, _RAN),
    "gguf-expert-count-by-layer": (equal_counts, _RAN),
    "gguf-layers": (whole_layers, _READ),
    "gguf-query-rank": (ranked_queries, _READ),
    "gguf-gating": (stated_gating, _READ),
    "gguf-pre-tokenizer": (known_splitting, _RAN),
}
"""Name -> the function, and what it was checked against."""


def file_problems(model: GgufModel) -> Iterator[Problem]:
    """What would keep llama.cpp from running a file, or end the process."""
    for look, _sources in FILE_RULES.values():
        yield from (problem for problem in look(model) if problem.happens[Runtime.LLAMA_CPP][0] is Effect.REFUSES)


def runnable_gguf(file: Path) -> GgufModel:
    """A GGUF file that llama.cpp loads: where it would end the process, a sentence comes before.

    Raises:
        InvalidInputError: it is not sound.
        UnsupportedError: llama.cpp is not installed.
    """
    model = open_gguf(file)
    require_llama()
    for problem in file_problems(model):
        raise InvalidInputError(f"{file}: {problem.what}; llama.cpp {problem.happens[Runtime.LLAMA_CPP][1]}.")
    require_survived(model.file)
    return model
