"""What a stage will take, before it starts: time, memory and disk, term by term. All of it is projected."""

from dataclasses import dataclass, field

PROJECTED = "Projected, not measured: within a factor of two or three where nothing else keeps the machine busy."


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A projection, not a measurement.

    Attributes:
        disk_bytes: free space needed for the output and what lies beside it while it is made.
        output_bytes: size of the result.
        peak_memory_bytes: of the process, Python and its libraries included.
        device_memory_bytes: of the GPU; None on the CPU.
        seconds: of all terms; None where rates were not measured.
        tokens_per_expert: mean calibration tokens that reach a routed expert.
        time: term -> seconds.
        memory: term -> bytes; `libraries`, `token buffers` and `mapped files` (what is resident of the token buffers
            beyond the limit) are there all the time, of the others those that meet.
        disk: term -> bytes; not all of the output is there while the most hidden states are.
        notes: what a user should know beforehand.
        shortages: those of the notes that a run says too, before its work.
    """

    disk_bytes: int
    output_bytes: int
    peak_memory_bytes: int
    seconds: float | None
    tokens_per_expert: float | None
    device_memory_bytes: int | None = None
    time: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    shortages: tuple[str, ...] = ()
