"""Tiny models with a multi-token-prediction layer in both forms, and that layer by transformers' own modules."""

import copy
import json
from pathlib import Path
from typing import Any

import every_family
import tiny_models
import torch
from torch import Tensor, nn

KINDS = ("deepseek_v3", "glm4_moe", "qwen3_next", "qwen3_5_moe")


def make(kind: str, folder: Path, *, fused: bool = False) -> Path:
    """A tiny model of that type with an MTP layer whose weights are its own."""
    if kind == "deepseek_v3":
        tiny_models.make(kind, folder, fused=fused)
    else:
        every_family.save(every_family.build(kind), folder, fused=fused)
    if kind.startswith("qwen"):
        tiny_models.add_mtp_apart(folder, 3, layers_at=layers_at(folder), seed=5)
    else:
        tiny_models.add_mtp(folder, seed=5)
    return folder


def layers_at(folder: Path) -> str:
    """The prefix of the decoder layers' names on disk."""
    names = [
        name for name in tiny_models.load_tensors(folder) if ".layers.3.self_attn." in name or ".layers.2." in name
    ]
    return next(n.split("layers.")[0] for n in names if not n.startswith(("mtp.", "model.visual"))) + "layers."


def own_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the decoder layer within the MTP layer, by their names in it, and its joint."""
    tensors = tiny_models.load_tensors(folder)
    joint = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
    if any(name.startswith("mtp.") for name in tensors):
        names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
        found = {kind: tensors[f"mtp.{name}.weight"] for kind, name in zip(joint, names, strict=True)}
        prefix = "mtp.layers.0."
    else:
        prefix = f"model.layers.{json.loads((folder / 'config.json').read_text())['num_hidden_layers']}."
        found = {kind: tensors[f"{prefix}{kind}.weight"] for kind in joint}
    layer = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return {n: t for n, t in layer.items() if not n.startswith(joint)}, found


def fused_experts(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """A decoder layer's tensors as transformers' module has them: experts in two tensors."""
    rest = {name: tensor for name, tensor in layer.items() if not name.startswith("mlp.experts.")}
    if "mlp.experts.gate_up_proj" in layer:
        return layer
    count = sum(name.startswith("mlp.experts.") and name.endswith("up_proj.weight") for name in layer)

    def every(role: str) -> Tensor:
        return torch.stack([layer[f"mlp.experts.{expert}.{role}_proj.weight"] for expert in range(count)])

    rest["mlp.experts.gate_up_proj"] = torch.cat((every("gate"), every("up")), dim=1)
    return rest | {"mlp.experts.down_proj": every("down")}


def predicted(folder: Path, windows: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
    """The MTP layer's forward by transformers' modules: the last decoder layer once more, called as the model calls it.

    Returns:
        Its output [N, T, D]; of its router the expert numbers and weights [N * T, K]; its experts' module with what
        came to it as `inputs`.
    """
    config = json.loads((folder / "config.json").read_text())
    model = every_family.auto_class(config["model_type"]).from_pretrained(folder, dtype=torch.float32).eval()
    body = model.get_decoder()
    arguments: dict[str, Any] = {}
    handle = body.layers[-1].register_forward_pre_hook(
        lambda _module, _given, named: arguments.update(named), with_kwargs=True
    )
    with torch.no_grad():
        hidden = body(input_ids=windows, use_cache=False).last_hidden_state  # behind the final norm
        handle.remove()
        layer, (own, joint) = copy.deepcopy(body.layers[-1]), own_tensors(folder)
        missing = layer.load_state_dict({n: t.float() for n, t in fused_experts(own).items()}, strict=True)
        assert not missing.missing_keys

        def norm(name: str, values: Tensor) -> Tensor:
            module = copy.deepcopy(layer.input_layernorm)
            module.load_state_dict({"weight": joint[name].float()})
            return module(values)  # type: ignore[no-any-return]

        following = torch.cat((windows[:, 1:], windows[:, -1:]), dim=1)
        embedded = model.get_input_embeddings()(following)
        inputs = torch.cat((norm("enorm", embedded), norm("hnorm", hidden)), dim=-1)
        seen: dict[str, Any] = {}
        experts = layer.mlp.experts
        experts.register_forward_pre_hook(lambda _module, given: seen.update(given=given))
        arguments.pop("hidden_states", None)
        output = layer(nn.functional.linear(inputs, joint["eh_proj"].float()), **arguments)
    output = output[0] if isinstance(output, tuple) else output
    reached, chosen, weights = seen["given"]
    experts.inputs = reached.flatten(0, -2)
    return output, chosen, weights, experts


def weighted_norms(chosen: Tensor, weights: Tensor, experts: Any) -> Tensor:
    """Sum over an expert's tokens of the combine weight times its output's norm, fp64 [E]: one token at a time."""
    sums = torch.zeros(len(experts.down_proj), dtype=torch.float64)
    for token, (numbers, shares) in enumerate(zip(chosen.tolist(), weights.tolist(), strict=True)):
        for expert, share in zip(numbers, shares, strict=True):
            gate, up = (experts.gate_up_proj[expert] @ experts.inputs[token]).chunk(2)
            output = experts.down_proj[expert] @ (experts.act_fn(gate) * up)
            sums[expert] += share * output.norm().item()
    return sums
