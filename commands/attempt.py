"""What is known of the command that runs, should it fail. Every command imports this; what says so, `crash`, none."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class Attempt:
    """What is known of the command that runs: its name, the folder of -o where it can be resumed, and --debug."""

    command: str | None = None
    output: Path | None = None
    debug: bool = False
