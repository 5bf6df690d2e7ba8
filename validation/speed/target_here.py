"""Is this machine's GPU one of the table? Then what was measured on it is held against the projection."""

import re
from collections.abc import Sequence

from moepress.validation.quality.results import Throughput
from moepress.validation.speed.results import SpeedCheck, TargetFit
from moepress.validation.speed.targets import Target

_MEMORY_WORD = re.compile(r"\d+gb")
_OTHER_CARD = {"ti", "super", "laptop", "mobile", "xt", "xtx", "gre", "d", "max", "pro", "ultra", "nvl", "pcie"}
"""Words of a name that make it another card."""
_MEMORY_OFF = 0.2  # of a card sold with so many GB, what its driver reports


def target_here(device: str, memory_bytes: int, targets: Sequence[Target]) -> Target | None:
    """The GPU of the table that a driver names so.

    Args:
        device: such as `NVIDIA GeForce RTX 3060`.
        memory_bytes: what the driver says it has; cards of one name are sold with several sizes.
        targets: the table.
    """
    found = [t for t in targets if _same_name(t.name, device)]
    near = min(found, key=lambda t: abs(t.memory_bytes - memory_bytes), default=None)
    if near is None or abs(near.memory_bytes - memory_bytes) > _MEMORY_OFF * near.memory_bytes:
        return None
    return near


def _same_name(sold: str, device: str) -> bool:
    own, other = (_words(name) for name in (sold, device))
    return own - {"sxm"} <= other and own & _OTHER_CARD == other & _OTHER_CARD


def _words(name: str) -> set[str]:
    return {word for word in re.findall(r"[a-z0-9]+", name.lower()) if not _MEMORY_WORD.fullmatch(word)}


def speed_checks(throughput: Throughput, target: Target, rows: Sequence[TargetFit]) -> tuple[SpeedCheck, ...]:
    """Every test that was measured on a GPU and is projected for it, in any runtime.

    Args:
        throughput: measured on this machine.
        target: this machine's GPU.
        rows: the projections.
    """
    fits = {row.subject: row for row in rows if row.target == target.id}
    found = []
    for row in throughput.rows:
        projected = getattr(fits.get(row.subject), row.test, None) if row.test in ("pp512", "tg128") else None
        if projected is None or row.tokens_per_second is None or row.provider != "CUDA":
            continue
        speed = row.tokens_per_second.value
        nearest = min(max(speed, projected.low), projected.high)
        found.append(
            SpeedCheck(
                subject=row.subject,
                target=target.id,
                test=row.test,
                runtime=row.runtime,
                measured=speed,
                projected=projected,
                off=speed / nearest,
                note=row.note,
            )
        )
    return tuple(found)
