"""A whole model in memory: transformers' own, filled from any source of weights, for models that fit.

Quantized weights are dequantized as they are read, so what runs is what the codes stand for, in transformers' code.
"""

import gc
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from moepress.errors import MoepressError
from moepress.models.families.family import numbered
from moepress.models.families.places import Places, tensors_of
from moepress.models.families.skeleton import build_skeleton, head_of
from moepress.models.forward.tensor_check import check_tensors
from moepress.models.storage.checkpoint import Source
from moepress.models.storage.experts import Expert, read_expert
from moepress.runs.progress import track


def load_dense(source: Source, *, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' causal language model with the source's weights, in eval mode.

    The experts lie in the fused tensors of transformers 5 and are filled one expert at a time: the peak is the model
    plus one expert (or one other tensor).

    Args:
        source: where the weights come from.
        device: where the model lies.
        dtype: of its weights; tensors that the family keeps in fp32 stay so.

    Raises:
        MoepressError: the model does not fit into the memory that is free.
        InvalidInputError: the source's tensors do not fit its config, or hold NaN or Inf.
    """
    model = build_skeleton(source.config, attention="sdpa")  # as transformers runs it: its speed is measured
    folder = getattr(source, "folder", "the model folder")
    check_tensors(source.family, source.config, source.outline.shape, source.shapes, folder=folder, model=model)
    _require_memory(model, device, dtype)
    model.requires_grad_(False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = _rest(source, model, shapes, device, dtype)
    layers = source.outline.moe_layers
    with track("load", len(layers), unit="layers") as advance:
        for layer in layers:
            weights |= _experts(source, model, layer, device, dtype)
            advance(1)
    weights |= {n: torch.empty(s, dtype=dtype) for n, s in shapes.items() if 0 in s and n not in weights}
    missing = set(model.load_state_dict(weights, strict=False, assign=True).missing_keys)
    tied = _tied(source, model)
    assert missing <= tied | _towers(source, shapes), f"not filled: {sorted(missing)}"
    if missing & tied:  # as check_tensors has seen
        head_of(model).weight = model.get_input_embeddings().weight
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model.eval()


def _rest(
    source: Source, model: Any, shapes: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """All tensors but the experts', by their names in transformers' model; of converters, what they make."""
    family, weights, converted = source.family, dict[str, Tensor](), dict[str, Tensor]()
    fused = {name for layer in source.outline.moe_layers for name in family.fused_names(layer)}
    for disk_name in source.shapes:
        if disk_name in fused or family.expert_of(disk_name) is not None:
            continue
        if family.converted and numbered(disk_name)[0] in family.converted:
            converted[disk_name] = _read(source, disk_name, device, dtype)
        # A multi-token-prediction layer is in the folder and not in transformers' model.
        elif (name := family.module_name(disk_name)) in shapes:
            weights[name] = _read(source, disk_name, device, dtype)
    return weights | (tensors_of(Places(model, source.shapes), converted) if converted else {})


def _experts(source: Source, model: Any, layer: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer's experts module, filled one expert at a time."""
    family = source.family
    path = f"{family.module_layers_at}{layer}.{family.experts_module}"
    module = model.get_submodule(path)
    held = {
        name: torch.empty(value.shape, device=device, dtype=dtype)
        for name, value in module.named_parameters(recurse=False)
    }
    for number in range(len(held["down_proj"])):
        # Held by no name: one at a time.
        put_expert(module, {name: value[number] for name, value in held.items()}, read_expert(source, layer, number))
    return {f"{path}.{name}": value for name, value in held.items()}


def put_expert(module: nn.Module, rows: Mapping[str, Tensor], expert: Expert) -> None:
    """Copy one expert into its rows of transformers' tensors, which may lie transposed and interleaved.

    Args:
        module: the experts module, which says how they lie.
        rows: its tensors' rows of that expert, by name; filled.
        expert: the matrices.
    """
    first = rows["gate_up_proj"] if "gate_up_proj" in rows else rows["up_proj"]
    down = rows["down_proj"]
    # One of the two shapes tells, for D is not both F and 2F; where there is no gate the class does.
    differs = first.shape != expert.first.shape or down.shape != expert.down.shape
    transposed = differs or bool(getattr(module, "is_transposed", False))
    _put(module, first.mT if transposed else first, expert.gate, expert.up)
    (down.mT if transposed else down).copy_(expert.down)
    for name, gate, other in (
        ("gate_up_proj_bias", expert.gate_bias, expert.up_bias),
        ("up_proj_bias", None, expert.up_bias),
        ("down_proj_bias", None, expert.down_bias),
    ):
        if name in rows and other is not None:
            _put(module, rows[name], gate, other)


def _put(module: nn.Module, rows: Tensor, gate: Tensor | None, up: Tensor) -> None:
    if gate is None:
        rows.copy_(up)
    elif getattr(module, "is_concatenated", True):
        rows[: len(gate)].copy_(gate)
        rows[len(gate) :].copy_(up)
    else:
        rows[0::2].copy_(gate)
        rows[1::2].copy_(up)


def _tied(source: Source, model: Any) -> set[str]:
    """The head's weight, where the folder has none and it is that of the embeddings."""
    head = head_of(model)
    names = {f"{name}.weight" for name, module in model.named_modules() if head is not None and module is head}
    return names if source.family.head not in source.shapes else set()


def _towers(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """What a derived family's model may have and its text body does not need."""
    body = source.family.module_layers_at.removesuffix("layers.")
    return {name for name in shapes if not name.startswith(body)} if source.family.derived else set()


def free_memory_bytes(device: torch.device) -> int:
    """Memory that is free on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def release_dense(device: torch.device) -> None:
    """Give back what a model took of that device's memory, once nothing names it: its modules are in cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def dense_bytes(model: Any, dtype: torch.dtype) -> int:
    """What the parameters of a model, on the meta device or any other, take in that dtype; tied ones count once."""
    parameters: int = sum(weight.numel() for weight in model.parameters())
    return parameters * dtype.itemsize


def _require_memory(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    needed, free = dense_bytes(model, dtype), free_memory_bytes(device)
    if needed > free:
        smaller = "use --dtype bfloat16, or " if dtype == torch.float32 else ""
        raise MoepressError(
            f"The whole model needs {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, and "
            f"{free / 2**30:.1f} GiB are free ({device}); {smaller}take a machine with more memory."
        )


def _read(source: Source, disk_name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    float32 = source.family.float32
    keep = bool(float32) and disk_name.endswith(float32)
    tensor = source.read(disk_name)
    return tensor.to(device, torch.float32 if keep else dtype) if tensor.is_floating_point() else tensor.to(device)
