"""What projecting gives: plain rows that the report takes over as they are. All are projected but `SpeedCheck`."""

from pydantic import BaseModel, ConfigDict

from moepress.validation.speed.projection import Interval, Load
from moepress.validation.speed.targets import Target, Verdict


class _Row(BaseModel):
    """Frozen, and nothing unknown in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class TargetFit(_Row):
    """One model on one GPU alone.

    Attributes:
        subject: the model's label.
        target: id of the GPU.
        name: as it is sold.
        memory_bytes: of the GPU.
        needed_bytes: weights and KV cache.
        verdict: `fits` leaves the reserve free, `tight` a third of it, `no` less.
        left_bytes: memory beside them; negative where they alone are too much.
        lacking_bytes: how much memory more would make it `tight`.
        pp512, tg128: tokens per second by the formulas of the section, projected; None where it does not fit.
        ram_layers, ram_bytes: layers whose experts lie in the memory behind the GPU, and what those take there.
        disk_bytes: of that, what memory does not hold and is read from the disk.
        cpu_moe: llama.cpp's `--n-cpu-moe` for that, which counts layers from the first, dense ones too.
    """

    subject: str
    target: str
    name: str
    memory_bytes: int
    needed_bytes: int
    verdict: Verdict
    left_bytes: int
    lacking_bytes: int
    pp512: Interval | None = None
    tg128: Interval | None = None
    ram_layers: int = 0
    ram_bytes: int = 0
    disk_bytes: int = 0
    cpu_moe: int = 0


class SubjectLoad(_Row):
    """What the formulas of a projection know of one model.

    Attributes:
        subject: its label.
        weight_bytes: its weights on disk.
        cache_bytes: KV cache of the section's context.
        load: what it asks of a GPU.
    """

    subject: str
    weight_bytes: int
    cache_bytes: int
    load: Load


class SpeedCheck(_Row):
    """What was measured on this machine's GPU, and what the formulas say of it.

    Attributes:
        subject: the model's label.
        target: id of the GPU.
        test: `pp512` or `tg128`.
        runtime: what ran it.
        measured: tokens per second.
        projected: the interval for it.
        off: measured over the nearer end of the interval; 1 inside of it.
        note: of the measurement, such as that codes were made dense, which the formulas do not know.
    """

    subject: str
    target: str
    test: str
    runtime: str
    measured: float
    projected: Interval
    off: float
    note: str | None = None


class Targets(_Row):
    """Which GPU holds the models, and how fast they would be there: projected, but for `measured`.

    Attributes:
        context: tokens in the KV cache.
        reserve: share of a GPU's memory that `fits` leaves free.
        tight_reserve: the same for `tight`.
        projection: formula of each test's tokens per second.
        loads: what the formulas know of each model.
        table: the GPUs.
        rows: every model on every GPU.
        measured: where this machine has one of them, its measured speeds beside the projected ones.
        chosen: id of the GPU that the user aims at; None where none was named.
    """

    context: int
    reserve: float
    tight_reserve: float
    projection: dict[str, str]
    loads: tuple[SubjectLoad, ...]
    table: tuple[Target, ...]
    rows: tuple[TargetFit, ...]
    measured: tuple[SpeedCheck, ...] = ()
    chosen: str | None = None
