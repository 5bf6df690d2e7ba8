"""`moepress completion`: the script that makes a shell complete."""

import os
from pathlib import Path

import click

from moepress.commands.console import say
from moepress.errors import UsageError

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.pass_context
def completion(context: click.Context, shell: str | None) -> None:
    """Print a script that completes commands, options, `demo`, model folders, GPUs, criteria and runtimes on TAB; for
    SHELL, or else the login shell.

    \b
    Example:  moepress completion bash >> ~/.bashrc
              moepress completion zsh > ~/.zfunc/_moepress
              moepress completion fish > ~/.config/fish/completions/moepress.fish
    """
    say(completion_script(context.find_root().command, shell, os.environ.get("SHELL", "")))


def completion_script(group: click.Command, shell: str | None, login_shell: str) -> str:
    """The script that makes a shell complete `moepress`; without a name, for the login shell.

    Raises:
        UsageError: there is no script for the login shell.
    """
    from click.shell_completion import get_completion_class

    chosen = shell or Path(login_shell).name
    made = get_completion_class(chosen)
    if made is None or chosen not in SHELLS:
        raise UsageError(f"There is no completion for {chosen or 'this shell'}; name one of {', '.join(SHELLS)}.")
    return made(group, {}, "moepress", "_MOEPRESS_COMPLETE").source().strip()
