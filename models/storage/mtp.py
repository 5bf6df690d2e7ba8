"""Multi-token-prediction layers: where their tensors are, and with which experts they are kept.

A decoder layer behind the last drafts the token after the next, for speculative decoding: a runtime without it decodes
at half to two thirds of the speed. Runtimes build it from the same config, so it must have the model's expert count.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from moepress.errors import UnsupportedError, UsageError
from moepress.models.families.family import Family
from moepress.models.storage.checkpoint import Source
from moepress.models.storage.experts import mtp_layers, router_disk_names


class Mtp(StrEnum):
    """What becomes of the multi-token-prediction layers."""

    DROP = "drop"
    KEEP = "keep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """Names on disk of what joins a hidden state and an embedding before such a layer, and of the norm behind it.

    Attributes:
        embedding_norm, hidden_norm: weights [D].
        project: [D, 2D]; its columns are those of the embedding first, then those of the hidden state.
        norm: [D], before the head; it may be left out where nothing follows but the head.
        copies: tensors of the model that a folder may repeat here.
    """

    embedding_norm: str
    hidden_norm: str
    project: str
    norm: str
    copies: tuple[str, ...]


def joint_of(family: Family, layer: int) -> Joint:
    """The joint of a layer: DeepSeek-V3's and GLM's names within it, or Qwen3-Next's beside all of them."""
    if family.mtp_at:
        root = family.mtp_root
        return Joint(
            embedding_norm=f"{root}pre_fc_norm_embedding.weight",
            hidden_norm=f"{root}pre_fc_norm_hidden.weight",
            project=f"{root}fc.weight",
            norm=f"{root}norm.weight",
            copies=(f"{root}embed_tokens.weight", f"{root}lm_head.weight"),
        )
    own = prefix_of(family, layer)
    return Joint(
        embedding_norm=f"{own}enorm.weight",
        hidden_norm=f"{own}hnorm.weight",
        project=f"{own}eh_proj.weight",
        norm=f"{own}shared_head.norm.weight",
        copies=(f"{own}embed_tokens.weight", f"{own}shared_head.head.weight"),
    )


def prefix_of(family: Family, layer: int) -> str:
    """What all names of a decoder layer begin with, also of one behind the last."""
    return family.at(f"{family.layers_at}{{layer}}.", layer)


def twin_of(source: Source, layer: int) -> int:
    """The decoder layer that a multi-token-prediction layer is made like.

    Of the layers with experts the one that has most of its names (layers of linear attention have others), and of
    those that are alike the last, one of full attention before one of a sliding window.
    """
    own = _inner_names(source, layer)
    stated = source.family.text(source.config).get("layer_types")
    kinds = stated if isinstance(stated, list) else []

    def likeness(other: int) -> tuple[int, bool, int]:
        full = other < len(kinds) and kinds[other] == "full_attention"
        return len(own & _inner_names(source, other)), full, other

    return max(source.outline.moe_layers, key=likeness)


def _inner_names(source: Source, layer: int) -> set[str]:
    prefix = prefix_of(source.family, layer)
    return {name.removeprefix(prefix) for name in source.outline.names_by_layer.get(layer, ())}


def mtp_keep_sets(
    source: Source, count: int, measured: Mapping[int, list[int]], *, degroup: bool = False
) -> dict[int, list[int]]:
    """Which experts of the multi-token-prediction layers stay: the plan's, else those of `lowest_biases`.

    Args:
        source: the original, with all experts.
        count: experts that stay in every layer; legal for the model (`require_legal`).
        measured: what the plan says, by the statistics of a profile.
        degroup: the router's groups are dropped; otherwise as many stay in each.

    Returns:
        layer -> experts kept, ascending; empty for a model without such a layer.

    Raises:
        UnsupportedError: nothing says which experts a layer should keep.
        UsageError: the plan names a layer that is not there.
    """
    layers, shape = mtp_layers(source), source.outline.shape
    strange = sorted(set(measured) - set(layers))
    if strange:
        raise UsageError(
            f"The plan keeps experts of the multi-token-prediction layer {strange[0]}, which this model has not; "
            "profile and plan this one."
        )
    keep = {}
    for layer in layers:
        if layer in measured:
            keep[layer] = list(measured[layer])
        elif count == shape.experts:
            keep[layer] = list(range(count))
        else:
            keep[layer] = lowest_biases(source, layer, count, groups=1 if degroup else shape.groups)
    return keep


def lowest_biases(source: Source, layer: int, count: int, *, groups: int) -> list[int]:
    """The experts with the lowest correction bias of a layer's router, for plans that no profile has measured it for.

    Without an auxiliary loss, training adds to an expert's bias while it gets fewer tokens than the others, and takes
    away while it gets more (arXiv 2408.15664). In the end all get about as many, and an expert is chosen where
    s_te + b_e passes the other choices, so its combine weights, which are made of s_te alone, are the larger the lower
    b_e is. With equal counts that order is the one of the `gate` criterion. What it does not see: how large an expert's
    output is, and the user's text. A draft is verified by the model, so a wrong choice costs speed and never changes an
    output.

    Raises:
        UnsupportedError: the layer's router has no correction bias.
    """
    size = source.outline.shape.experts // groups
    names = [name for name in router_disk_names(source, layer) if name.endswith("bias") and name in source.shapes]
    if not names:
        raise UnsupportedError(
            f"The plan says nothing of the multi-token-prediction layer {layer}, and its router has no correction bias "
            "to choose experts by; profile the model again and plan anew, or use --mtp drop."
        )
    bias = source.read(names[0]).double().flatten().tolist()
    return sorted(
        expert
        for group in range(groups)
        for expert in sorted(range(group * size, (group + 1) * size), key=lambda e: (bias[e], e))[: count // groups]
    )


def mtp_note(dropped: int, keep: Mapping[int, list[int]], experts_before: int, *, measured: bool = False) -> list[str]:
    """What a user should know of the layer; nothing where the model has none.

    Args:
        dropped: tensors of the layer that are not in the result.
        keep: `mtp_keep_sets` where it is kept, else empty.
        experts_before: experts of a layer of the original.
        measured: a profile's statistics chose them all.
    """
    if not keep:
        return [f"The multi-token-prediction layer was dropped ({dropped} tensors)."] if dropped else []
    count = len(next(iter(keep.values())))
    if count == experts_before:
        return ["The multi-token-prediction layer was kept."]
    by = (
        "chosen by its own router's statistics like those of the other layers"
        if measured
        else "those with the lowest correction bias (the plan's profile did not run this layer)"
    )
    what = f"The multi-token-prediction layer was kept with {count} of {experts_before} experts, {by}"
    return [f"{what}; drafts may be accepted less often, and no output changes."]
