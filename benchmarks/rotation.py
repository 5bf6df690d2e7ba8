"""The same model with its residual stream turned by an orthogonal matrix, folded into stock weights.

With h' = R h behind every layer a matrix that reads the stream becomes W diag(gain) R^T and one that writes it R W;
norms lose their gains, which lie before R, and a gainless RMSNorm does not notice R (QuaRot, arXiv 2404.00456;
SpinQuant, arXiv 2405.16406, calls it R1). Heads' values are turned by another matrix (R2), which the output projection
takes back, and so are the latents of multi-head latent attention. What comes out loads like the original and gives the
same logits up to the rounding of its dtype. For the tensor names of DeepSeek V3 and Qwen3-MoE, embeddings and lm_head
not tied.

Shape letters: D hidden size, L latent, H heads, V values per head, O and I rows and columns of a matrix.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_INPUT_READERS = ("q_a_proj", "kv_a_proj_with_mqa", "q_proj", "k_proj", "v_proj")
_MLP_READERS = ("gate_proj", "up_proj", "gate")


def random_hadamard(size: int, generator: torch.Generator) -> Tensor:
    """A Hadamard matrix over sqrt(size), fp64, its columns with random signs; `size` is a power of 2."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    if len(matrix) != size:
        raise SystemExit(f"no Hadamard matrix of {size} columns is made here: a power of 2 is needed")
    return matrix * (torch.randint(0, 2, (size,), generator=generator) * 2 - 1) / size**0.5


Turn = Callable[[int, torch.Generator], Tensor]


def rotate(
    model: Path, out: Path, *, seed: int = 0, dtype: torch.dtype | None = None, turn: Turn = random_hadamard
) -> None:
    """Write the turned model, in the dtypes of the original or in one for all.

    Args:
        model: a folder with one file of weights.
        out: is made.
        seed: of the matrices.
        dtype: of all weights.
        turn: an orthogonal matrix of a size, fp64.
    """
    generator = torch.Generator().manual_seed(seed)
    config = json.loads((model / "config.json").read_text())
    if config.get("tie_word_embeddings"):
        raise SystemExit(f"{model}: embeddings and lm_head are one tensor, which can not hold the last norm's gain too")
    stored = load_file(model / "model.safetensors")
    weights = {name: tensor.double() for name, tensor in stored.items()}
    stream_DD = turn(config["hidden_size"], generator)
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] @ stream_DD.T
    _fold(weights, ["lm_head.weight"], "model.norm.weight", stream_DD)
    for layer in range(config["num_hidden_layers"]):
        _turn_layer(weights, f"model.layers.{layer}.", config, stream_DD, turn, generator)
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors"))
    (out / "config.json").chmod(0o644)
    found = {name: tensor.to(dtype or stored[name].dtype).contiguous() for name, tensor in weights.items()}
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})


def _fold(weights: dict[str, Tensor], readers: list[str], norm: str, turned: Tensor) -> None:
    """Put a norm's gain and R^T into what reads it."""
    gain = weights[norm]
    for name in readers:
        weights[name] = (weights[name] * gain) @ turned.T
    weights[norm] = torch.ones_like(gain)


def _turn_layer(
    weights: dict[str, Tensor],
    prefix: str,
    config: dict[str, Any],
    stream_DD: Tensor,
    turn: Turn,
    generator: torch.Generator,
) -> None:
    own = [name for name in weights if name.startswith(prefix) and name.endswith(".weight")]
    leaf = {name: name.split(".")[-2] for name in own}
    attention = [n for n in own if ".self_attn." in n and leaf[n] in _INPUT_READERS]
    _fold(weights, attention, f"{prefix}input_layernorm.weight", stream_DD)
    mlp = [n for n in own if ".mlp." in n and leaf[n] in _MLP_READERS]
    _fold(weights, mlp, f"{prefix}post_attention_layernorm.weight", stream_DD)
    for name in own:
        if leaf[name] in ("o_proj", "down_proj"):
            weights[name] = stream_DD @ weights[name]
    at = f"{prefix}self_attn."
    latent = "kv_lora_rank" in config
    width = config["v_head_dim" if latent else "head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    values_VV = turn(width, generator)
    o_DHV = weights[f"{at}o_proj.weight"].view(-1, heads, width)
    weights[f"{at}o_proj.weight"] = (o_DHV @ values_VV.T).flatten(1)
    if not latent:
        v_HVI = weights[f"{at}v_proj.weight"].view(groups, width, -1)
        weights[f"{at}v_proj.weight"] = (values_VV @ v_HVI).flatten(0, 1)
        return
    kv_HOI = weights[f"{at}kv_b_proj.weight"].view(heads, -1, config["kv_lora_rank"]).clone()
    kv_HOI[:, -width:] = values_VV @ kv_HOI[:, -width:]
    weights[f"{at}kv_b_proj.weight"] = kv_HOI.flatten(0, 1)
    for first, norm, second in (
        ("q_a_proj", "q_a_layernorm", "q_b_proj"),
        ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"),
    ):
        size = len(weights[f"{at}{norm}.weight"])
        latent_LL = turn(size, generator)
        written_OD = weights[f"{at}{first}.weight"].clone()
        written_OD[:size] = latent_LL @ written_OD[:size]  # behind them are rotary keys, which stay
        weights[f"{at}{first}.weight"] = written_OD
        _fold(weights, [f"{at}{second}.weight"], f"{at}{norm}.weight", latent_LL)
