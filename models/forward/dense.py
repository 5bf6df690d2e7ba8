"""A whole model in memory: transformers' own, filled from any source of weights, for models that fit.

Quantized weights are dequantized as they are read, so what runs is what the codes stand for, in transformers' code.
"""

import gc
from typing import Any

import psutil
import torch
from torch import Tensor

from moepress.errors import MoepressError
from moepress.models.families.skeleton import build_skeleton
from moepress.models.forward.tensor_check import check_tensors
from moepress.models.storage.checkpoint import Source
from moepress.models.storage.experts import Expert, read_expert
from moepress.runs.progress import track


def load_dense(source: Source, *, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' causal language model with the source's weights, in eval mode.

    The experts lie in the two fused tensors of transformers 5, `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F],
    and are filled one expert at a time: the peak is the model plus one expert (or one other tensor).

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
    weights: dict[str, Tensor] = {}
    for disk_name in source.shapes:
        name = source.family.module_name(disk_name)
        # A multi-token-prediction layer is in the folder and not in transformers' model.
        if name in shapes and ".experts." not in name:
            weights[name] = _read(source, disk_name, device, dtype)
    layers = source.outline.moe_layers
    with track("load", len(layers), unit="layers") as advance:
        for layer in layers:
            block = f"model.layers.{layer}.{source.family.moe_module}.experts"
            gate_up = torch.empty(shapes[f"{block}.gate_up_proj"], device=device, dtype=dtype)
            down = torch.empty(shapes[f"{block}.down_proj"], device=device, dtype=dtype)
            for number in range(gate_up.shape[0]):
                _put(
                    read_expert(source, layer, number), gate_up[number], down[number]
                )  # held by no name: one at a time
            weights |= {f"{block}.gate_up_proj": gate_up, f"{block}.down_proj": down}
            advance(1)
    weights |= {n: torch.empty(s, dtype=dtype) for n, s in shapes.items() if 0 in s and n not in weights}
    missing = set(model.load_state_dict(weights, strict=False, assign=True).missing_keys)
    assert missing <= {"lm_head.weight"}, f"not filled: {sorted(missing)}"
    if missing:  # tied, as check_tensors has seen
        model.lm_head.weight = model.model.embed_tokens.weight
    _make_rotary(model, device)
    return model.eval()


def _put(expert: Expert, gate_up: Tensor, down: Tensor) -> None:
    """Copy one expert into its place in the fused tensors, [2F, D] and [D, F]."""
    gate_up_2FD = gate_up.unflatten(0, (2, -1))
    gate_up_2FD[0].copy_(expert.gate)
    gate_up_2FD[1].copy_(expert.up)
    down.copy_(expert.down)


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
    return source.read(disk_name).to(device, torch.float32 if keep else dtype)


def _make_rotary(model: Any, device: torch.device) -> None:
    """Make the rotary embedding anew: its frequencies follow from the config and are in no file."""
    body = model.model
    body.rotary_emb = type(body.rotary_emb)(config=model.config).to(device)
    stray = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not stray, f"not materialised: {stray}"
