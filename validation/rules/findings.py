"""What `check` finds: which rule, in which runtime, what happens there, and how to mend it."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from moepress.errors import UsageError


class Runtime(StrEnum):
    """Runtimes whose rules are known."""

    VLLM = "vllm"
    SGLANG = "sglang"
    TRANSFORMERS = "transformers"
    GPTQMODEL = "gptqmodel"
    LLAMA_CPP = "llama.cpp"
    ONNXRUNTIME = "onnxruntime"
    MLX = "mlx"


class Effect(StrEnum):
    """What a runtime does with a folder that breaks a rule."""

    REFUSES = "refuses"
    WRONG = "silently wrong"
    SLOWER = "slower"
    OPTION = "wrong with an option"
    EXPORT = "wants an export"


Happens = Mapping[Runtime, tuple[Effect, str]]
"""What each runtime does that the problem touches, and in which words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What one rule found, for all runtimes that it touches."""

    what: str
    happens: Happens
    mend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A problem in one runtime.

    Attributes:
        rule: the rule's name.
        runtime: where it shows.
        effect: refuses, silently wrong, slower, wrong where an option of the runtime is given, or takes the model in
            another format, to which it can be exported.
        what: what is there.
        happens: what the runtime does.
        mend: what to do.
        source: the versions of the runtimes that the rule was checked against, and how.
    """

    rule: str
    runtime: Runtime
    effect: Effect
    what: str
    happens: str
    mend: str
    source: str

    @property
    def fails(self) -> bool:
        """Whether the model cannot be used there: speed is no failure, nor an option of the runtime, nor an export."""
        return self.effect in (Effect.REFUSES, Effect.WRONG)


def first(names: list[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def parse_runtimes(text: str | None) -> tuple[Runtime, ...]:
    """The runtimes of --runtime, with commas between them; none where it was not given.

    Raises:
        UsageError: a name is not one of a runtime, or there is none.
    """
    if text is None:
        return ()
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in list(Runtime)]
    if unknown or not names:
        raise UsageError(
            f"--runtime {unknown[0] if unknown else text!r} is not known; choose of {', '.join(Runtime)}, with commas."
        )
    return tuple(dict.fromkeys(Runtime(name) for name in names))
