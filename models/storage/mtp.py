"""The multi-token-prediction layer: dropped, or kept with as many experts as every other layer.

DeepSeek-V3 and R1 carry one decoder layer behind the last, which drafts the token after the next. Runtimes build it
from the same config, so it must have the model's expert count.
"""

from collections.abc import Mapping
from enum import StrEnum

from moepress.errors import UnsupportedError
from moepress.models.storage.checkpoint import Source
from moepress.models.storage.experts import mtp_layers, router_disk_names


class Mtp(StrEnum):
    """What becomes of the multi-token-prediction layer."""

    DROP = "drop"
    KEEP = "keep"


def mtp_keep_sets(source: Source, count: int, *, degroup: bool = False) -> dict[int, list[int]]:
    """Which experts of the multi-token-prediction layers stay: those with the lowest correction bias of their router.

    A profile says nothing of this layer, for the forward pass does not run it. Its router does: without an auxiliary
    loss, training adds to an expert's bias while it gets fewer tokens than the others, and takes away while it gets
    more (arXiv 2408.15664). In the end all get about as many, and an expert is chosen where s_te + b_e passes the other
    choices, so its combine weights, which are made of s_te alone, are the larger the lower b_e is. With equal counts
    that order is the one of the `gate` criterion. What it does not see: how large an expert's output is, and the user's
    text. A draft is verified by the model, so a wrong choice costs speed and never changes an output.

    Args:
        source: the original, with all experts.
        count: experts that stay in every layer; legal for the model (`require_legal`).
        degroup: the router's groups are dropped; otherwise as many stay in each.

    Returns:
        layer -> experts kept, ascending; empty for a model without such a layer.

    Raises:
        UnsupportedError: the layer's router has no correction bias.
    """
    shape = source.outline.shape
    groups = 1 if degroup else shape.groups
    size = shape.experts // groups
    keep: dict[int, list[int]] = {}
    for layer in mtp_layers(source):
        names = [name for name in router_disk_names(source, layer) if name.endswith("bias") and name in source.shapes]
        if not names:
            raise UnsupportedError(
                f"The router of the multi-token-prediction layer {layer} has no correction bias to choose experts by; "
                "use --mtp drop."
            )
        bias = source.read(names[0]).double().tolist()
        keep[layer] = sorted(
            expert
            for group in range(groups)
            for expert in sorted(range(group * size, (group + 1) * size), key=lambda e: (bias[e], e))[: count // groups]
        )
    return keep


def mtp_note(dropped: int, keep: Mapping[int, list[int]], experts_before: int) -> list[str]:
    """What a user should know of the layer; nothing where the model has none.

    Args:
        dropped: tensors of the layer that are not in the result.
        keep: `mtp_keep_sets` where it is kept, else empty.
        experts_before: experts of a layer of the original.
    """
    if keep:
        count = len(next(iter(keep.values())))
        how = (
            f" with {count} of {experts_before} experts, those with the lowest correction bias (no calibration token "
            "passes this layer); drafts may be accepted less often, and no output changes"
            if count < experts_before
            else ""
        )
        return [f"The multi-token-prediction layer was kept{how}."]
    return [f"The multi-token-prediction layer was dropped ({dropped} tensors)."] if dropped else []


def refuse_quantized_mtp(source: Source) -> None:
    """Refuse `quantize --mtp keep`.

    Raises:
        UnsupportedError: the model has such a layer.
    """
    if mtp_layers(source):
        raise UnsupportedError(
            "quantize cannot keep the multi-token-prediction layer, for no calibration token passes it; use --mtp "
            "drop, or keep it unquantized with `moepress prune --mtp keep`."
        )
