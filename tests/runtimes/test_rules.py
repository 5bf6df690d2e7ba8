"""What `check` says that vLLM does with a broken folder, held against vLLM: it refuses, or loads it all the same."""

import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from check_folders import Outputs, edit_json, edit_quantization, found
from runtime_folders import tokens
from runtime_runs import RUNTIMES, Answer, ask, slow_where_there
from torch import Tensor

from moepress.validation.rules.findings import Effect, Runtime

VLLM = RUNTIMES["vllm"]
Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A folder that breaks a rule.

    Attributes:
        rule: its name.
        layout, key: of `Outputs`, which it is a copy of.
        spoil: what is done to the copy.
        says: part of vLLM's message, where it refuses; that it refuses something else shows nothing.
        named: part of the id, where a rule is broken in several ways.
    """

    rule: str
    layout: str = "compressed"
    key: str = "qwen3_moe"
    spoil: Callable[[Path], object]
    says: str = ""
    named: str = ""

    @property
    def id(self) -> str:
        """For pytest, and the folder's name."""
        return "-".join(filter(None, (self.rule, self.layout, self.named)))


def tensors(change: Callable[[Tensors], object]) -> Callable[[Path], object]:
    """Spoil tensors."""
    return lambda folder: tiny_models.rewrite(folder, change)


def config(**changes: Any) -> Callable[[Path], object]:
    """Change keys of config.json; `...` removes one."""
    return lambda folder: tiny_models.edit_config(folder, **changes)


def quantization(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change what is said of codes, in both files that may say it."""

    def spoil(folder: Path) -> None:
        edit_quantization(folder, change)
        if (folder / "quantize_config.json").is_file():
            edit_json(folder / "quantize_config.json", change)

    return spoil


def drop(part: str) -> Callable[[Path], object]:
    """Take away tensors with that in their names."""
    return tensors(lambda held: [held.pop(name) for name in list(held) if part in name])


def to_codes(module: str) -> Callable[[Path], object]:
    """Give a module with plain weights another's codes."""

    def change(held: Tensors) -> None:
        del held[f"{module}.weight"]
        like = next(name.rpartition(".")[0] for name in held if name.endswith(".weight_packed"))
        held |= {module + n.removeprefix(like): t.clone() for n, t in held.items() if n.startswith(f"{like}.")}

    return tensors(change)


def to_plain(module: str) -> Callable[[Path], object]:
    """Give a quantized module plain weights."""

    def change(held: Tensors) -> None:
        for name in [n for n in held if n.startswith(f"{module}.")]:
            del held[name]
        held[f"{module}.weight"] = torch.zeros(64, 128)

    return tensors(change)


def cut(layer: int, count: int) -> Callable[[Path], object]:
    """Only so many experts in one layer, and a router to match."""

    def change(held: Tensors) -> None:
        for name in [n for n in held if f"layers.{layer}.mlp." in n]:
            expert = name.partition(".experts.")[2].partition(".")[0]
            if expert and int(expert) >= count:
                del held[name]
            elif ".mlp.gate." in name:
                held[name] = held[name][:count].clone()

    return tensors(change)


def mixed(values: dict[str, Any]) -> None:
    """A second config group of 8 bits, for the down projections of a layer."""
    group = values["config_groups"]["group_0"]
    own = {
        **group,
        "targets": [r"re:.*layers\.1\..*experts.*\.down_proj"],
        "weights": {**group["weights"], "num_bits": 8},
    }
    values["config_groups"]["group_1"] = own


def to_fp8(held: Tensors) -> None:
    """The head in fp8, with its scales."""
    held["lm_head.weight"], held["lm_head.weight_scale_inv"] = tiny_models.fp8_blocks(
        held["lm_head.weight"], (128, 128)
    )


def half(part: str) -> Callable[[Path], object]:
    """Half of the columns of a tensor."""

    def change(held: Tensors) -> None:
        name = next(name for name in held if name.endswith(part))
        held[name] = held[name][:, : held[name].shape[1] // 2].contiguous()

    return tensors(change)


def first_shard(folder: Path) -> Path:
    """The first of a folder's files of weights."""
    return sorted(folder.glob("*.safetensors"))[0]


BROKEN = (
    Broken(rule="index", says="missing", spoil=lambda folder: first_shard(folder).unlink()),
    Broken(rule="experts-complete", spoil=drop("layers.1.mlp.experts.3.down_proj")),
    Broken(rule="tensors-complete", spoil=drop("layers.1.input_layernorm.weight")),
    Broken(
        rule="expert-count-in-config",
        says="Tried to load weights of size",
        spoil=config(num_experts=16, num_local_experts=16),
    ),
    Broken(rule="expert-count-by-layer", layout="pruned", says="Tried to load weights of size", spoil=cut(2, 6)),
    Broken(rule="expert-count-legal", layout="pruned", says="out of range", spoil=config(num_experts_per_tok=9)),
    Broken(
        rule="tensor-names",
        says="embed_tokens",
        layout="original",
        spoil=tensors(lambda held: [held.update({n.removeprefix("model."): held.pop(n)}) for n in list(held)]),
    ),
    Broken(rule="tied-head", layout="original", spoil=config(tie_word_embeddings=True)),
    Broken(rule="desc-act", layout="gptq", says="desc_act", spoil=quantization(lambda q: q.update(desc_act=True))),
    Broken(
        rule="group-size", layout="gptq", says="group_size = 16", spoil=quantization(lambda q: q.update(group_size=16))
    ),
    Broken(
        rule="group-size-in-width",
        says="divisible by group_size",
        spoil=quantization(lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=128)),
    ),
    Broken(rule="mixed-bits-in-layer", says="same quantization scheme", spoil=quantization(mixed)),
    Broken(rule="router-unquantized", says="mlp.gate.weight_packed", spoil=to_codes("model.layers.1.mlp.gate")),
    Broken(
        rule="router-excluded",
        says="mlp.gate.weight",
        spoil=quantization(lambda q: q["ignore"].remove("model.layers.1.mlp.gate")),
    ),
    Broken(
        rule="linears-excluded", named="plain", says="o_proj.weight", spoil=to_plain("model.layers.1.self_attn.o_proj")
    ),
    Broken(
        rule="linears-excluded",
        named="codes",
        says="o_proj",
        spoil=quantization(lambda q: q["ignore"].append(r"re:.*\.o_proj$")),
    ),
    Broken(rule="embeddings-unquantized", says="embed_tokens.weight_packed", spoil=to_codes("model.embed_tokens")),
    Broken(rule="fused-linears", says="QKVParallelLinear", spoil=to_plain("model.layers.1.self_attn.k_proj")),
    Broken(
        rule="fp8-beside-gptq",
        says="weight_scale_inv",
        layout="gptq",
        spoil=tensors(to_fp8),
    ),
    Broken(rule="config-keys", layout="gptq", says="bits", spoil=quantization(lambda q: q.pop("bits"))),
    Broken(rule="codes-complete", named="scales", spoil=half(".3.down_proj.weight_scale")),
    Broken(rule="codes-complete", named="codes", spoil=half(".3.down_proj.weight_packed")),
)


@pytest.fixture(scope="module")
def said(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Mapping[str, Any]]:
    """Every broken folder, and what vLLM answered to it; all in one process."""

    @functools.cache
    def get() -> dict[str, tuple[Path, Answer]]:
        outputs = Outputs(folder=tmp_path_factory.mktemp("outputs"), tiny=tiny_model)
        place, folders = tmp_path_factory.mktemp("broken"), []
        for broken in BROKEN:
            folder = Path(shutil.copytree(getattr(outputs, broken.layout)(broken.key), place / broken.id))
            broken.spoil(folder)
            folders.append(folder)
        answers = ask(VLLM, folders, tokens(count=1), tmp_path_factory.mktemp("answers")).each
        return {one.id: (folder, answer) for one, folder, answer in zip(BROKEN, folders, answers, strict=True)}

    return get


@pytest.mark.parametrize("broken", [pytest.param(one, id=one.id, marks=slow_where_there(VLLM)) for one in BROKEN])
def test_vllm_does_with_a_broken_folder_what_check_says(
    broken: Broken, said: Callable[[], Mapping[str, tuple[Path, Answer]]]
) -> None:
    if VLLM.python is None:
        pytest.skip(VLLM.how_to_make)
    folder, answer = said()[broken.id]
    effect = found(folder, broken.rule)[Runtime.VLLM]
    assert effect in (Effect.REFUSES, Effect.WRONG)
    assert (answer.log_probs is None) == (effect is Effect.REFUSES), answer.error[-2000:]
    assert bool(broken.says) == (effect is Effect.REFUSES)
    assert broken.says in answer.error
