"""Models in every layout that moepress writes, made by its own commands, for the runtimes to load."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models
import torch
from byte_tokenizer import byte_tokenizer
from safetensors.torch import save_file
from stage_runs import CPU, AsTransformers, command, keep_of, pruned_folder
from torch import Tensor

from moepress.converters.safetensors.artifact import Artifact, open_source
from moepress.models.forward.dense import load_dense
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.places import model_folder

QUANTIZE = ("quantize", "--group-size", "32", "--tokens", "2048")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a folder is made.

    Attributes:
        of: the layout that it is made of.
        words: of the command that makes it.
    """

    of: str
    words: tuple[str, ...]


LAYOUTS = {
    "CT 4": Layout(of="pruned", words=(*QUANTIZE, "--bits", "4")),
    "CT 4 experts": Layout(of="pruned", words=(*QUANTIZE, "--bits", "4", "--include", "none")),
    "CT 4 asymmetric": Layout(of="pruned", words=(*QUANTIZE, "--bits", "4", "--asymmetric")),
    "CT 8": Layout(of="pruned", words=(*QUANTIZE, "--bits", "8")),
    "CT 3": Layout(of="pruned", words=(*QUANTIZE, "--bits", "3")),
    "NVFP4": Layout(of="pruned", words=("quantize", "--tokens", "2048", "--include", "none", "--scheme", "nvfp4")),
    "MXFP4": Layout(of="pruned", words=("quantize", "--tokens", "2048", "--include", "none", "--scheme", "mxfp4")),
    "GPTQ 4": Layout(of="CT 4", words=("export", "--to", "gptq")),
    "GPTQ 4 named": Layout(of="CT 4", words=("export", "--to", "gptq", "--names", "transformers")),
    "GPTQ 4 asymmetric": Layout(of="CT 4 asymmetric", words=("export", "--to", "gptq")),
    "GPTQ 8": Layout(of="CT 8", words=("export", "--to", "gptq")),
    "GPTQ 3": Layout(of="CT 3", words=("export", "--to", "gptq")),
    "ONNX 4": Layout(of="CT 4", words=("export", "--to", "onnx", "--no-check")),
    "ONNX 8": Layout(of="CT 8", words=("export", "--to", "onnx", "--no-check")),
    "GGUF 4": Layout(of="CT 4", words=("export", "--to", "gguf")),
    "GGUF 4 as fp32": Layout(of="CT 4", words=("export", "--to", "gguf", "--outtype", "f32")),
    "GGUF 8": Layout(of="CT 8", words=("export", "--to", "gguf")),
    "MLX 4": Layout(of="CT 4", words=("export", "--to", "mlx")),
    "MLX 4 asymmetric": Layout(of="CT 4 asymmetric", words=("export", "--to", "mlx")),
    "MLX 8": Layout(of="CT 8", words=("export", "--to", "mlx")),
    "MLX 3": Layout(of="CT 3", words=("export", "--to", "mlx")),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-MoE": ("qwen3_moe", {}),
    "Mixtral": ("mixtral", {"hidden_size": 128}),
    # vLLM's latent attention on a CPU has one size of heads: a rank of 512 and 64 more that are rotated.
    "DeepSeek-V3": (
        "deepseek_v3",
        {"hidden_size": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "q_lora_rank": 64, "rope_parameters": None},
    ),
}
"""Made models, by recipe of `tiny_models` and what differs; besides them there is `demo`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """Each folder is made when it is first asked for, and remembered."""

    work: Path

    def path(self, model: str, layout: str) -> Path:
        """Of a model in a layout; of GGUF the file."""
        out = self.work / f"{model}-{layout}".replace(" ", "-")
        if layout.startswith("GGUF"):
            out = out.with_name(f"{out.name}.gguf")
        if not out.exists():
            self._make(model, layout, out)
        return out

    def source(self, model: str, layout: str) -> Path:
        """The folder that moepress reads with the same codes: of exports that of compressed-tensors."""
        while layout.startswith(("ONNX", "GGUF", "MLX")) or layout.endswith("named"):
            layout = LAYOUTS[layout].of
        return self.path(model, layout)

    def exact(self, model: str, layout: str) -> Any:
        """transformers' model with the exact products of codes and scales, in fp32."""
        source = open_source(self.source(model, layout))
        if isinstance(source, Artifact):
            source = dataclasses.replace(source, exact=True)
        return load_dense(source, device=CPU, dtype=torch.float32)

    def rounded(self, model: str, layout: str) -> Any:
        """The same with the experts' products rounded to the scales' dtype, as transformers rounds them."""
        source = open_source(self.source(model, layout))
        assert isinstance(source, Artifact)
        return load_dense(AsTransformers.of(source), device=CPU, dtype=torch.float32)

    def dense(self, model: str, layout: str) -> Path:
        """A plain fp32 folder with these products, for runtimes that are held against themselves."""
        out = self.work / f"{model}-{layout}-dense".replace(" ", "-")
        if not out.exists():
            source = open_source(self.source(model, layout))
            assert isinstance(source, Artifact)
            source = dataclasses.replace(source, exact=True)
            out.mkdir()
            for file in source.folder.glob("*.json"):
                if not file.name.endswith(".index.json"):
                    shutil.copy(file, out)
            tensors = {name: source.read(name).float().contiguous() for name in source.shapes}
            save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
            tiny_models.edit_config(out, quantization_config=..., dtype="float32")
        return out

    def _make(self, model: str, layout: str, out: Path) -> None:
        if layout == "original":
            self._original(model, out)
        elif layout == "pruned":
            source = open_checkpoint(self.path(model, "original"))
            pruned_folder(source.folder, keep_of(source, source.shape.experts * 3 // 4), out)
        else:
            made = LAYOUTS[layout]
            code, _, said = command(made.words[0], self.path(model, made.of), "-o", out, *made.words[1:])
            assert code == 0, said

    def _original(self, model: str, out: Path) -> None:
        if model == "demo":
            shutil.copytree(model_folder("demo"), out)
            return
        key, changes = MODELS[model]
        tiny_models.make(key, out, dtype=torch.bfloat16, **changes)
        byte_tokenizer(out, merges=True)


def tokens(count: int = 3, length: int = 32) -> Tensor:
    """Random token ids that every model here has, int64 [count, length]."""
    return torch.randint(3, 250, (count, length), generator=torch.Generator().manual_seed(5))


def log_probs(model: Any, tokens_NT: Tensor) -> Tensor:
    """fp32 [N, T - 1, V] of what follows each token but the last."""
    with torch.inference_mode():
        found: Tensor = torch.log_softmax(model(tokens_NT).logits.double(), -1)[:, :-1].float()
    return found
