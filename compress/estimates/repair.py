"""What a repair takes, before it starts: a profile's pass, with two streams instead of one."""

from dataclasses import replace

from moepress.compress.estimates.estimate import Estimate
from moepress.compress.estimates.figures import Figures
from moepress.compress.estimates.footprint import Workload
from moepress.compress.estimates.profile import estimate_profile
from moepress.compress.estimates.rates import Rates

_ONCE = {"start", "read"}  # experts are read once for both streams
_TWICE = ("token buffers", "mapped files", "layer")


def estimate_repair(figures: Figures, work: Workload, rates: Rates | None = None) -> Estimate:
    """Twice a profile's forward pass; every expert is read once, and of K outputs a token K are kept for the second."""
    profile = estimate_profile(figures, work, rates, leave_one_out=True, bit_losses=False)
    time = {term: seconds * (1 if term in _ONCE else 2) for term, seconds in profile.time.items()}
    memory = {term: size * (2 if term in _TWICE else 1) for term, size in profile.memory.items()}
    disk = {term: 0 if term in {"output", "statistics by layer"} else 2 * size for term, size in profile.disk.items()}
    more = sum(memory.values()) - sum(profile.memory.values())
    return replace(
        profile,
        disk_bytes=sum(disk.values()),
        output_bytes=0,
        peak_memory_bytes=profile.peak_memory_bytes + more,
        device_memory_bytes=profile.device_memory_bytes and 2 * profile.device_memory_bytes,
        seconds=sum(time.values()) if rates is not None else None,
        time=time,
        memory=memory,
        disk=disk,
    )
