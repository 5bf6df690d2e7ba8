"""Every error that moepress raises on purpose, with the exit code it stands for.

    MoepressError              1   the base: the user can do something about it
    ├── StoreError             1   a store (bucket, shared folder) does not answer, refuses, or cannot do what is needed
    ├── UsageError             2   an option, or a request that is not legal (an expert count that groups forbid, ...)
    ├── ThresholdMissedError   3   a quality threshold given on the command line was missed
    ├── InvalidInputError      4   a file or folder is corrupt, incomplete, or not what it says it is
    ├── UnsupportedError       5   a model family, storage format or runtime that moepress does not handle
    └── OutputLockedError      6   another run writes to the same output

Any other exception is a bug in moepress (exit 1, its traceback in a file). Ctrl-C and SIGTERM end with 130; such a run
can be resumed.
Messages say what is wrong, where (file and tensor), and what to do, in one sentence or two.
"""


class MoepressError(Exception):
    """Something the user can mend; `exit_code` is what the command line ends with."""

    exit_code = 1


class StoreError(MoepressError):
    """A store does not answer, refuses, or cannot do what is needed of it."""


class UsageError(MoepressError):
    """An option or a request that is not legal."""

    exit_code = 2


class ThresholdMissedError(MoepressError):
    """A threshold given by the user was missed by more than the measurement's error."""

    exit_code = 3


class InvalidInputError(MoepressError):
    """An input is corrupt, incomplete, or not what it claims to be."""

    exit_code = 4


class UnsupportedError(MoepressError):
    """A model family, a storage format or a runtime that moepress does not handle."""

    exit_code = 5


class OutputLockedError(MoepressError):
    """Another process writes to the same output."""

    exit_code = 6
