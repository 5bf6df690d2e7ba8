"""Tiny models with codes, exported to ONNX and run: what the tests of the ONNX export and of its sessions share.

Letters: B batch, S tokens given, V vocabulary.
"""

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_models
import torch
from stage_runs import keep_of, quantized_folder, streamed_logits
from torch import Tensor

from moepress.converters.onnx.export import OnnxRequest
from moepress.converters.onnx.folder import open_onnx
from moepress.converters.safetensors.artifact import Artifact, open_source
from moepress.converters.safetensors.compressed_tensors import layer_tensors
from moepress.converters.safetensors.compressed_tensors_config import quantization_config
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.families.family import Part, part_of
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.models.storage.experts import router_disk_names
from moepress.stages.export import onnx_stage
from moepress.stages.places import Output
from moepress.validation.quality.onnx_session import Decoding, open_session

PREFILL, DECODE = 24, 32  # tokens at once, and then one by one
G16 = Scheme(bits=4, group_size=16)
PARTS = (Part.ROUTED, Part.ATTENTION, Part.SHARED, Part.DENSE)
_LINEAR = r".*(_proj|_with_mqa|\.w[123]|lm_head)$"  # modules on disk, whatever the family calls its experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Folders of the whole test run, each made when it is first asked for; nobody may change them."""

    folder: Path
    tiny: Callable[..., Path]
    made: dict[str, Path] = field(default_factory=dict)
    logits: dict[Path, Tensor] = field(default_factory=dict)

    def quantized(self, key: str) -> Path:
        """Pruned to half of its experts, 4 bits in groups of 16, attention, shared experts and dense layers too."""

        def make(out: Path) -> None:
            source = open_checkpoint(self.tiny(key))
            quantized_folder(
                source.folder,
                windows_for(source.folder),
                out,
                keep=keep_of(source, source.shape.experts // 2),
                scheme=G16,
                include=["attention", "shared", "dense"],  # type: ignore[list-item]
            )

        return self._once(f"quantized-{key}", make)

    def coded(self, key: str, scheme: Scheme, *, parts: Sequence[Part] = PARTS, **options: Any) -> Path:
        """The tiny model with random codes of that scheme; `options` are those of `tiny_models.make`."""
        name = f"coded-{key}-{scheme.bits}-{scheme.group_size}-{'-'.join(p.name for p in parts)}-{options}"
        name = re.sub(r"[^\w.-]+", "", name)
        return self._once(name, lambda out: coded_folder(self.tiny(key, **options), out, lambda _n: scheme, parts))

    def onnx(self, folder: Path, **request: Any) -> Path:
        """That folder in ONNX, not checked; `request` are fields of `OnnxRequest`."""
        name = "-".join(["onnx", *folder.parts[-2:], *(f"{k}={v}" for k, v in sorted(request.items()))])
        return self._once(name, lambda out: to_onnx(folder, out, **request))

    def own_logits(self, folder: Path) -> Tensor:
        """What `own_logits` gives for `tokens_of` the folder; for folders that stay as they are."""
        if folder not in self.logits:
            self.logits[folder] = own_logits(folder, tokens_of(folder))
        return self.logits[folder]

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        if name not in self.made:
            make(self.folder / name)
            self.made[name] = self.folder / name
        return self.made[name]


_ALL: list[Models] = []


def models_of(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The folders of this test run: the same for every test module that asks."""
    if not _ALL:
        _ALL.append(Models(folder=tmp_path_factory.mktemp("onnx"), tiny=tiny_model))
    return _ALL[0]


def to_onnx(folder: Path, out: Path, **request: Any) -> Path:
    """Export without the self-check."""
    onnx_stage(str(folder), Output(folder=out), OnnxRequest(**request), check=False)
    return out


def windows_for(folder: Path, count: int = 3, length: int = 24, seed: int = 1) -> Tensor:
    """Random token windows of a model, int64 [count, length]."""
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    return tiny_models.windows(vocabulary, count=count, length=length, seed=seed)


def tokens_of(folder: Path, length: int = PREFILL + DECODE) -> Tensor:
    """The tokens that models are held against each other with, int64 [2, length]: a shorter text begins the longer."""
    return windows_for(folder, count=2, length=PREFILL + DECODE, seed=5)[:, :length]


def exact_source(folder: Path) -> Checkpoint | Artifact:
    """A folder's weights, codes multiplied out in fp32, as ONNX Runtime does it."""
    source = open_source(folder)
    return dataclasses.replace(source, exact=True) if isinstance(source, Artifact) else source


def own_logits(folder: Path, tokens_BS: Tensor) -> Tensor:
    """The folder's own logits by our streamed forward, fp32 [B, S, V]."""
    with tempfile.TemporaryDirectory() as scratch:
        return streamed_logits(exact_source(folder), tokens_BS, Path(scratch))


def onnx_logits(folder: Path, tokens_BS: Tensor, prefill: int | None = None, *, exact: bool = True) -> Tensor:
    """Logits of an ONNX folder on the CPU: `prefill` tokens at once (all where None), the others one by one."""
    decoding = Decoding(open_session(open_onnx(folder), "cpu", exact=exact))
    prefill = tokens_BS.shape[1] if prefill is None else prefill
    parts = [decoding.step(tokens_BS[:, :prefill])]
    parts += [decoding.step(tokens_BS[:, n : n + 1]) for n in range(prefill, tokens_BS.shape[1])]
    return torch.cat(parts, dim=1)


def padded_run(out: Path, rows: list[Tensor], after: list[int]) -> tuple[list[Tensor], Tensor]:
    """Rows of different length in one batch, padded on the right, then one more token each.

    Returns:
        Logits [S, V] of every row, and [B, V] of the tokens after.
    """
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    lengths, width = [len(row) for row in rows], max(len(row) for row in rows)

    def mask(total: int, more: int) -> Any:
        return np.array([[1] * (n + more) + [0] * (total - n - more) for n in lengths], dtype=np.int64)

    feed = {
        "input_ids": np.array([row.tolist() + [0] * (width - len(row)) for row in rows]),
        "attention_mask": mask(width, 0),
    }
    for value in session.get_inputs()[2:]:
        feed[value.name] = np.zeros((len(rows), value.shape[1], 0, value.shape[3]), dtype=np.float32)
    logits, *cache = session.run(None, feed)
    feed = {"input_ids": np.array(after)[:, None], "attention_mask": mask(width + 1, 1)}
    feed |= {value.name: part for value, part in zip(session.get_inputs()[2:], cache, strict=True)}
    then = session.run(None, feed)[0]
    first = [torch.from_numpy(row[:n]) for row, n in zip(logits, lengths, strict=True)]
    return first, torch.from_numpy(then[:, 0])


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).abs().max() / wanted.abs().max())


def token_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """Token by token: the largest difference of a logit, as a share of the largest logit of all."""
    return (found.double() - wanted.double()).abs().amax(dim=-1).flatten() / wanted.abs().max()


def graph_of(folder: Path) -> Any:
    """The graph of an ONNX folder, without its weights."""
    return onnx.load(str(folder / "model.onnx"), load_external_data=False)


def attributes_of(node: Any) -> dict[str, Any]:
    """A node's attributes as plain values."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def initializers_of(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every weight of an ONNX folder, read from its place in its file without onnx's own reader."""
    found = {}
    for tensor in graph_of(folder).graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            found[tensor.name] = onnx.numpy_helper.to_array(tensor)
            continue
        place = {row.key: row.value for row in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        raw = (folder / place["location"]).read_bytes()[int(place["offset"]) :][: int(place["length"])]
        found[tensor.name] = np.frombuffer(raw, dtype=dtype).reshape(tensor.dims)
    return found


def coded_folder(
    folder: Path, out: Path, scheme_of: Callable[[str], Scheme | None], parts: Iterable[Part] = PARTS
) -> Path:
    """A compressed-tensors folder of random codes, as large as they may be, in the place of a model's Linears.

    Args:
        folder: plain, one tensor per expert matrix.
        out: made here.
        scheme_of: module name to its scheme; None leaves it plain.
        parts: those whose Linears get codes.
    """
    source = open_checkpoint(folder)
    shutil.copytree(folder, out)
    generator = torch.Generator().manual_seed(0)
    wanted, used = set(parts), dict[Scheme, list[str]]()
    plain = []

    def encode(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in sorted(tensors) if tensors[n].dim() == 2 and n.endswith(".weight")]:
            module = name.removesuffix(".weight")
            linear = re.match(_LINEAR, module) and part_of(source.family, name, source.shape.layers) in wanted
            scheme = scheme_of(module) if linear else None
            if scheme is None:
                plain.extend([module] * ("embed_tokens" not in name))
                continue
            used.setdefault(scheme, []).append(module)
            codes, scales = random_codes(tensors[name].shape, scheme, generator, tensors.pop(name).dtype)
            tensors |= layer_tensors(module, codes, scales, scheme, scales.dtype)

    tiny_models.rewrite(out, encode)
    config = quantization_config(next(iter(used)), plain)
    if len(used) > 1:
        groups = [
            quantization_config(scheme, ())["config_groups"]["group_0"] | {"targets": names}
            for scheme, names in used.items()
        ]
        config["config_groups"] = {f"group_{n}": group for n, group in enumerate(groups)}
    tiny_models.edit_config(out, quantization_config=config)
    return out


def random_codes(
    shape: Sequence[int], scheme: Scheme, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Codes int8 [O, I] over their whole range, and scales [O, G] that keep the size of what passes through."""
    rows, columns = shape
    codes = torch.randint(scheme.code_min, scheme.code_max + 1, (rows, columns), generator=generator)
    spread = torch.rand(rows, scheme.groups(columns), generator=generator) + 0.5
    return codes.to(torch.int8), (spread * columns**-0.5 / codes.double().std().float()).to(dtype)


def drop_experts(folder: Path, out: Path, keep: Mapping[int, Sequence[int]]) -> Path:
    """A copy of a folder without some experts, renumbered, the routers' rows with them; layers may differ."""
    source = open_source(folder)
    shutil.copytree(folder, out)

    def drop(tensors: dict[str, Tensor]) -> None:
        for layer, kept in keep.items():
            marker = source.family.expert_names(layer, 0)[0].partition("experts.0.")[0] + "experts."
            mine = {n: tensors.pop(n) for n in list(tensors) if n.startswith(marker)}
            for new, old in enumerate(kept):
                prefix = f"{marker}{old}."
                rows = {n.removeprefix(prefix): t for n, t in mine.items() if n.startswith(prefix)}
                tensors.update({f"{marker}{new}.{rest}": tensor for rest, tensor in rows.items()})
            for name in router_disk_names(source, layer):
                tensors[name] = tensors[name][list(kept)].clone()

    tiny_models.rewrite(out, drop)
    return out


def dequantized(folder: Path, out: Path) -> Path:
    """The plain fp32 folder that a folder of codes stands for, for transformers."""
    source = exact_source(folder)
    shutil.copytree(folder, out)
    tiny_models.rewrite(
        out, lambda tensors: (tensors.clear(), tensors.update({n: source.read(n) for n in source.shapes}))
    )
    tiny_models.edit_config(out, quantization_config=...)
    return out
