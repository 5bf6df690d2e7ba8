"""What a shell offers on TAB beyond click's own: models, GPUs, lists with commas. Imports nothing heavy."""

from collections.abc import Callable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def complete_models(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`demo` and the folders that hold a model; where there is none of these, all folders."""
    start, slash, _ = incomplete.rpartition("/")
    found = [CompletionItem("demo", help="the embedded model")] if "demo".startswith(incomplete) else []
    place = Path(start + slash or ".").expanduser()
    folders = sorted(place.iterdir()) if place.is_dir() else []
    names = (f"{start}{slash}{folder.name}" for folder in folders if (folder / "config.json").is_file())
    found += [CompletionItem(name, help="a model folder") for name in names if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="dir")]


def complete_targets(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The ids of GPUs, those of --targets-file among them."""
    import tomllib
    from importlib.resources import files

    own = context.params.get("targets_file")
    names: dict[str, str] = {}
    for place in (files("moepress.validation.speed") / "targets.toml", Path(own) if own else None):
        try:
            rows = tomllib.loads(place.read_text(encoding="utf-8"))["target"] if place is not None else []
            names |= {str(row["id"]): str(row.get("name", "")) for row in rows}
        except (OSError, ValueError, KeyError, TypeError):  # a file that the command itself will speak of
            continue
    return [CompletionItem(name, help=text) for name, text in names.items() if name.startswith(incomplete)]


def complete_list(*names: str) -> Completer:
    """Names with commas between them; those that stand there already are not offered again."""

    def complete(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        start, comma, last = incomplete.rpartition(",")
        given = start.split(",")
        return [CompletionItem(f"{start}{comma}{n}") for n in names if n.startswith(last) and n not in given]

    return complete


def complete_runtimes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The runtimes that `check` has rules of."""
    from moepress.validation.rules.findings import Runtime

    return complete_list(*Runtime)(context, parameter, incomplete)
