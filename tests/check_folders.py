"""Real outputs of tiny models in every layout, copies of them to spoil, and what `check` finds in those."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models
from onnx_runs import to_onnx
from stage_runs import G32, keep_of, pruned_folder, quantized_folder

from moepress.compress.gptq.include import Include
from moepress.converters.safetensors.export import Target
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.export import export_stage
from moepress.stages.places import Output
from moepress.validation.rules.check import check_folder
from moepress.validation.rules.findings import Effect, Runtime

# Key -> what differs from the tiny models, so that vLLM's fast kernel and the GPTQ layout take them.
CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "deepseek_v3": {"hidden_size": 128, "q_lora_rank": 64, "kv_lora_rank": 48},
    "mixtral": {"hidden_size": 128},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Half of the experts pruned; 4 bits in groups of 32, attention too; each made when first asked for."""

    folder: Path
    tiny: Callable[..., Path]

    def original(self, key: str) -> Path:
        return self.tiny(key, **CHANGES[key])

    def pruned(self, key: str) -> Path:
        source = open_checkpoint(self.original(key))
        keep = keep_of(source, source.shape.experts // 2)
        return self._once(f"{key}-pruned", lambda out: pruned_folder(source.folder, keep, out))

    def compressed(self, key: str) -> Path:
        source = open_checkpoint(self.original(key))
        options: dict[str, Any] = {
            "keep": keep_of(source, source.shape.experts // 2),
            "scheme": G32,
            "include": [Include.ATTENTION],
        }
        words = tiny_models.windows(source.shape.vocabulary, count=2, length=16)
        return self._once(f"{key}-compressed", lambda out: quantized_folder(source.folder, words, out, **options))

    def gptq(self, key: str) -> Path:
        target: Target = "gptq"
        made = self.compressed(key)
        return self._once(f"{key}-gptq", lambda out: export_stage(str(made), Output(folder=out), target))

    def onnx(self, key: str) -> Path:
        made = self.compressed(key)
        return self._once(f"{key}-onnx", lambda out: to_onnx(made, out))

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        if not (self.folder / name).exists():
            make(self.folder / name)
        return self.folder / name


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Copies of outputs, which a test may spoil."""

    outputs: Outputs
    folder: Path

    def __call__(self, layout: str, key: str = "qwen3_moe") -> Path:
        return Path(shutil.copytree(getattr(self.outputs, layout)(key), self.folder / f"{key}-{layout}"))


def found(folder: Path, rule: str, **spread: int) -> dict[Runtime, Effect]:
    """What a rule finds in a folder, for every runtime; each finding says all that it has to say."""
    rows = [finding for finding in check_folder(folder, Runtime, **spread).findings if finding.rule == rule]
    assert all(row.what and row.happens and row.mend and row.source for row in rows)
    return {row.runtime: row.effect for row in rows}


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` edit a JSON file."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit_quantization(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` edit the `quantization_config` of config.json."""
    edit_json(folder / "config.json", lambda config: change(config["quantization_config"]))
