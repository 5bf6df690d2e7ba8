"""Patterns of module names in a config, `re:` and a regular expression: matched in bounded time, whoever wrote them.

Python's matcher goes back and forth over a name for as long as a pattern makes it: `(a+)+$` and thirty letters take
hours. So the ways through a pattern are counted first, from above; what has too many is refused, not tried.
"""

import re
import time
import warnings
from functools import lru_cache

from moepress.errors import InvalidInputError

PREFIX = "re:"
LONGEST = 4096  # of a pattern; ours for bits by layer list all layers
MOST_WAYS = 2_000_000  # as of three free stretches, `.*layers.*mlp.*gate_proj`, in a name of a hundred letters
SLOW_SECONDS = 0.002  # no honest match takes so long
MOST_SLOW_SECONDS = 5.0  # of all slow matches together

_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_ESCAPED = re.compile(r"\\[^1-9gk]", re.DOTALL)
# What is not counted: references, conditions, atomic groups, and comments and spaces between a group and its repeat.
_UNCOUNTED = re.compile(r"\\[1-9gk]|\(\?P?[=(>]|\(\?#|\(\?[a-zA-Z-]*x")
_TOKEN = re.compile(r"\((?:\?(?::|P<\w+>|=|!|<=|<!))?|\)|\||([*+?]|\{\d*,?\d*\})[?+]?|.", re.DOTALL)
_REPEAT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_slow = [0.0]


def matches(target: str, module: str) -> bool:
    """Whether a name or a `re:` pattern means a module: a pattern from the name's start, as `re.match` does.

    Raises:
        InvalidInputError: the pattern is no regular expression, or matching it could take for ever.
    """
    if not target.startswith(PREFIX):
        return target == module
    compiled = _compiled(target)
    if ways(compiled.pattern, len(module)) > MOST_WAYS:
        raise _too_many(target)
    before = time.thread_time()
    found = compiled.match(module) is not None
    took = time.thread_time() - before
    if took > SLOW_SECONDS:
        _slow[0] += took
        if _slow[0] > MOST_SLOW_SECONDS:
            raise _too_many(target)
    return found


@lru_cache(maxsize=1024)
def _compiled(target: str) -> re.Pattern[str]:
    pattern = target.removeprefix(PREFIX)
    if len(pattern) > LONGEST:
        raise InvalidInputError(
            f"config.json holds a pattern of {len(pattern):,} letters, {target[:40]!r}...; {LONGEST:,} are read: "
            "list the modules by name or shorten it."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what another version of Python might read otherwise
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InvalidInputError(
            f"config.json holds the pattern {target!r}, which is none ({error}); mend it."
        ) from error


def _too_many(target: str) -> InvalidInputError:
    return InvalidInputError(
        f"config.json holds the pattern {target[:80]!r}, which could be matched against a name in so many ways that it "
        "would not end; write it without repeats inside of repeats, or list the modules by name."
    )


@lru_cache(maxsize=4096)
def ways(pattern: str, length: int) -> int:
    """From above: in how many ways a matcher that goes back can try a pattern on a name of so many letters.

    Alternatives add up, what follows each other multiplies. A repeat may take any number of letters: as many ways as
    there are letters where one letter is repeated; where a group is repeated that itself has several ways, they
    multiply with every round.
    """
    if _UNCOUNTED.search(pattern.replace("\\\\", "a").replace("(?=", "(?!")):
        return MOST_WAYS + 1
    text = _ESCAPED.sub("a", pattern)
    text = _CLASS.sub("a", text).removesuffix(".*")  # at the end it takes all the rest at the first try
    groups = [[1]]  # of each open group: the ways of its alternatives, the last one open
    last = 1  # the ways of what a repeat would repeat
    for token in _TOKEN.finditer(text):
        word = token[0]
        if word.startswith("("):
            groups.append([1])
        elif word == "|":
            groups[-1].append(1)
        elif word == ")":
            inner = sum(groups.pop())
            groups[-1][-1] = _few(groups[-1][-1] * inner)
            last = max(inner, 2)  # a group may match nothing, which can be done any number of times
        elif token[1]:
            groups[-1][-1] = _few(groups[-1][-1] * _repeats(token[1], last, length))
        else:
            last = 1
    return _few(sum(groups[0]))


def _repeats(word: str, inner: int, length: int) -> int:
    """By how much a repeat multiplies the ways of what it repeats, which are counted once already."""
    if word == "?":
        return 2
    found = _REPEAT.fullmatch(word)
    exact = bool(found and found[1] and not found[2])
    most = found[1] if found and exact else found[3] if found else ""
    rounds = int(most[:9]) if most else length
    if inner > 1:
        return _few((rounds + 1) * inner ** min(rounds, 64))
    return 1 if exact else min(rounds, length) + 1


def _few(number: int) -> int:
    """A number that stays small enough to be multiplied again."""
    return min(number, MOST_WAYS + 1)
