"""What pruning takes, before it starts."""

from moepress.compress.estimates.estimate import PROJECTED, Estimate
from moepress.compress.estimates.footprint import (
    libraries_bytes,
)
from moepress.compress.estimates.rates import Rates


def estimate_prune(output_bytes: int, rates: Rates | None = None) -> Estimate:
    """Pruning copies bytes in chunks: what is read is what is written."""
    memory = {"libraries": libraries_bytes(), "chunks": 4 * (32 << 20)}
    time = {}
    if rates is not None:
        each = output_bytes / rates.read_bytes_per_second
        time = {"read": each, "check": output_bytes * rates.load_seconds / 4, "write": each}
    return Estimate(
        disk_bytes=output_bytes,
        output_bytes=output_bytes,
        peak_memory_bytes=sum(memory.values()),
        seconds=sum(time.values()) if rates is not None else None,
        tokens_per_expert=None,
        time=time,
        memory=memory,
        disk={"output": output_bytes},
        notes=(PROJECTED,),
    )
