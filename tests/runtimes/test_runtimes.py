"""Every runtime loads what moepress writes, and computes what codes times scales stand for.

`make test-runtimes` makes the environments that are not there, and runs all of this. pytest alone runs a quick part,
and skips what has no environment with the command that makes it. With `--record FILE` what was measured is written
down, from which `tests/runtimes/table.py` makes the table of docs/runtimes.md.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from runtime_folders import Folders, log_probs, tokens
from runtime_runs import RUNTIMES, Answer, ask, slow_where_there

FP32 = 1e-4
"""What sums in another order make of logits of about 10, between two implementations in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One folder in one runtime.

    Attributes:
        runtime, model, layout: keys of `RUNTIMES` and of `runtime_folders`.
        within: the largest difference of log probabilities from the exact dense weights.
        on_average: the mean difference instead: where something is rounded, a few tokens choose other experts.
        rounded: and the largest from products that are rounded to the scales' dtype, as transformers has them.
        itself: the exact weights run in the same runtime, not in transformers.
        refuses: the runtime raises an error that says this.
        wrong: it loads, and computes something else.
    """

    runtime: str
    model: str
    layout: str
    within: float = FP32
    on_average: float | None = None
    rounded: bool = False
    itself: bool = False
    refuses: str = ""
    wrong: bool = False

    @property
    def id(self) -> str:
        """For pytest."""
        return f"{self.runtime}-{self.model}-{self.layout}".replace(" ", "_")


def _cases(runtime: str, models: str, layouts: str, **more: object) -> Iterator[Case]:
    for model in models.split(", "):
        for layout in layouts.split(", "):
            yield Case(runtime=runtime, model=model, layout=layout, **more)  # type: ignore[arg-type]


_ALL = "demo, Qwen3-MoE, Mixtral"
CASES: tuple[Case, ...] = (
    *_cases("transformers", _ALL, "original, pruned"),
    *_cases("transformers", _ALL, "CT 4, CT 8, CT 3", on_average=0.05, rounded=True),
    *_cases("transformers", "demo", "MXFP4"),
    *_cases("transformers", "demo", "NVFP4", wrong=True),
    *_cases("onnxruntime", _ALL, "ONNX 4, ONNX 8"),
    *_cases("genai", _ALL, "ONNX 4, ONNX 8"),
    *_cases("llama.cpp", _ALL, "GGUF 4 as fp32"),
    *_cases("llama.cpp", "demo", "GGUF 4, GGUF 8", on_average=0.1),  # it rounds activations to 8 bits
    *_cases("mlx", _ALL, "MLX 4, MLX 8, MLX 3"),
    *_cases("mlx", _ALL, "MLX 4 asymmetric", on_average=0.1),  # biases are rounded to bf16
    *_cases("mlx", "demo", "CT 4 experts"),
    *_cases("mlx", "demo", "CT 4, CT 3", wrong=True),  # takes all codes for ones of 4 bits, those of attention have 8
    *_cases("mlx", "Mixtral", "CT 4, GPTQ 4", refuses="ValueError"),
    *_cases("gptqmodel", "demo, Qwen3-MoE", "GPTQ 4, GPTQ 8, GPTQ 3"),
    *_cases("gptqmodel", "Qwen3-MoE", "GPTQ 4 asymmetric", refuses="sym=False"),
    *_cases("gptqmodel", "Mixtral", "GPTQ 4", refuses="Missing required quantized weights"),
    *_cases("gptqmodel", "Mixtral", "GPTQ 4 named"),
    *_cases("vllm", "Qwen3-MoE, Mixtral", "original, pruned, CT 4, CT 8, CT 3, CT 4 asymmetric, GPTQ 4, GPTQ 8"),
    *_cases("vllm", "Qwen3-MoE, Mixtral", "NVFP4, MXFP4"),
    *_cases("vllm", "DeepSeek-V3", "CT 4, CT 8, CT 3, GPTQ 4", itself=True),
    *_cases("vllm", "Mixtral", "GPTQ 4 named", refuses="no module or parameter named 'layers.0.mlp'"),
    *_cases("vllm", "Qwen3-MoE", "GPTQ 3", refuses="Unsupported quantization config: bits=3, sym=True"),
    *_cases("vllm", "Qwen3-MoE", "GPTQ 4 asymmetric", refuses="Unsupported quantization config: bits=4, sym=False"),
)

WRONG = 0.3
"""A mean difference of log probabilities above which a model is another one."""
Asked = Callable[[str], tuple[str, dict[tuple[str, str], Answer]]]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(work=tmp_path_factory.mktemp("runtimes"))


@pytest.fixture(scope="session")
def asked(folders: Folders, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Asked:
    """A runtime's version and what it says to all cases that are to be run, loaded in one process."""
    chosen = {item.callspec.params["case"] for item in request.session.items if _is_case(item)}

    @functools.cache
    def get(name: str) -> tuple[str, dict[tuple[str, str], Answer]]:
        mine = [case for case in CASES if case in chosen and case.runtime == name]
        rows = [(case.model, case.layout) for case in mine]
        paths = [folders.path(*row) for row in rows]
        for case in mine:
            if case.itself:
                rows.append((case.model, f"{case.layout} dense"))
                paths.append(folders.dense(case.model, case.layout))
        made = ask(RUNTIMES[name], paths, tokens(), tmp_path_factory.mktemp("answers"))
        return made.version, dict(zip(rows, made.each, strict=True))

    return get


def _marked(case: Case) -> Any:
    """The quick part of the tests has one model in the runtimes that are always there."""
    quick = RUNTIMES[case.runtime].environment is None and case.model == "Qwen3-MoE"
    return pytest.param(case, id=case.id, marks=() if quick else slow_where_there(RUNTIMES[case.runtime]))


def _is_case(item: pytest.Item) -> bool:
    return "case" in getattr(getattr(item, "callspec", None), "params", {})


@pytest.mark.parametrize("case", [_marked(case) for case in CASES])
def test_a_runtime_computes_what_the_codes_stand_for(
    case: Case, folders: Folders, asked: Asked, record: Callable[..., None]
) -> None:
    runtime = RUNTIMES[case.runtime]
    if runtime.python is None:
        pytest.skip(runtime.how_to_make)
    version, answers = asked(case.runtime)
    answer = answers[case.model, case.layout]
    if case.refuses:
        assert case.refuses in answer.error
        record(case, version, refuses=case.refuses)
        return
    assert answer.log_probs is not None, answer.error
    if case.itself:
        wanted = answers[case.model, f"{case.layout} dense"].log_probs
        assert wanted is not None
    else:
        wanted = log_probs(folders.exact(case.model, case.layout), tokens())
    difference = (answer.log_probs - wanted).abs()
    largest, mean = float(difference.max()), float(difference.mean())
    record(case, version, largest=largest, mean=mean)
    if case.wrong:
        assert mean > WRONG, "it was wrong, and is right now: mend the rule of `check`"
    elif case.on_average is not None:
        assert mean <= case.on_average
    else:
        assert largest <= case.within
    if case.rounded:
        wanted = log_probs(folders.rounded(case.model, case.layout), tokens())
        assert float((answer.log_probs - wanted).abs().max()) <= FP32
