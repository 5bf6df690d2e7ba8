"""check: a folder held against the rules of the runtimes that are to load it."""

from moepress.stages.places import model_place
from moepress.validation.rules.check import Checked, check_folder
from moepress.validation.rules.findings import parse_runtimes


def check_stage(output: str, runtimes: str | None, *, tensor_parallel: int = 1, expert_parallel: int = 1) -> Checked:
    """Hold what `output` names against the rules.

    Args:
        output: a folder in any layout, or an id on the hub.
        runtimes: names with commas between them; None for those that the layout is made for.
        tensor_parallel: devices that every matrix is split over.
        expert_parallel: devices that the experts are dealt to.

    Raises:
        UsageError: there is no such runtime, or there are no rules of it for such a folder.
        InvalidInputError: there is no such folder, or it is not sound.
    """
    return check_folder(
        model_place(output),
        parse_runtimes(runtimes),
        tensor_parallel=tensor_parallel,
        expert_parallel=expert_parallel,
    )
