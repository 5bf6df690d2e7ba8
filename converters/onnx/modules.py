"""What transformers' modules compute, asked of them on a few numbers: skeletons have no weights to run them with."""

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moepress.models.forward.gating import gating_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """What experts do between their matrices, as `swiglu` of QMoE and MoE computes it.

    min(gate, limit) * sigmoid(alpha * min(gate, limit)) * (clamp(up, -limit, limit) + beta)

    Attributes:
        alpha, beta: of it.
        limit: None for none.
    """

    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """The same on tensors."""
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)


@torch.no_grad()
def is_rms_norm(norm: Any) -> bool:
    """Whether a norm computes weight * x / sqrt(mean(x^2) + eps), tried on a few numbers."""
    eps = getattr(norm, "variance_epsilon", None)
    if [*norm.state_dict()] != ["weight"] or not isinstance(eps, float):
        return False
    own = copy.deepcopy(norm).to_empty(device="cpu")
    weight, values = torch.linspace(0.5, 2, own.weight.numel()), torch.linspace(-3, 2, 4 * own.weight.numel())
    own.weight.copy_(weight.view_as(own.weight))
    rows = values.sin().view(4, -1) * torch.tensor([[1e-3], [0.1], [1.0], [30.0]])
    wanted = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps) * weight
    return torch.allclose(own(rows), wanted, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def is_silu(function: Any) -> bool:
    """Whether an activation is silu, tried on a few numbers."""
    values = torch.linspace(-12, 12, 97)
    return callable(function) and torch.allclose(function(values), nn.functional.silu(values), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def activation_of(module: nn.Module, config: Any) -> Activation | None:
    """What transformers' experts module does between its matrices; None where the graph has no nodes for it.

    Found by trying: each number that the module holds may be alpha or the limit.
    """
    if not hasattr(module, "gate_up_proj"):
        return None
    gating = gating_of(module, nn.functional.silu)
    if gating.after is not None:
        return None
    numbers = sorted(
        {float(v) for k, v in vars(module).items() if type(v) is float or (type(v) is int and "limit" in k)}
    )
    reach = 2 * max([6.0, *numbers])
    gate, up = torch.meshgrid(torch.linspace(-reach, reach, 101), torch.linspace(-reach, reach, 103), indexing="ij")
    found = gating.between(gate, up)
    for alpha, beta, limit in itertools.product((1.0, *numbers), (0.0, 1.0), (None, *numbers)):
        tried = Activation(alpha=alpha, beta=beta, limit=limit)
        if torch.allclose(tried(gate, up), found, rtol=1e-5, atol=1e-6):
            return tried
    return None


def rotary_of(model: Any) -> Any:
    """The model's rotary module with its frequencies, which the skeleton has on the meta device."""
    return type(model.model.rotary_emb)(config=model.config)


def is_latent(attention: nn.Module) -> bool:
    """Whether an attention is latent (MLA)."""
    return hasattr(attention, "kv_a_proj_with_mqa")
