"""What `check` found, for people, on stdout."""

from collections import Counter

from rich.markup import escape

from moepress.commands.printed import plain_console, plain_table
from moepress.validation.rules.check import Checked
from moepress.validation.rules.findings import Effect, Finding


def print_checked(found: Checked) -> None:
    """A row for each runtime, then every problem with what happens where and how to mend it."""
    console = plain_console(markup=True)
    console.print(f"[bold]{escape(found.folder)}[/bold]  {found.kind}, held against {found.rules} rules")
    table = plain_table("runtime", *Effect)
    for runtime in found.runtimes:
        counts = Counter(finding.effect for finding in found.findings if finding.runtime is runtime)
        table.add_row(runtime, *(str(counts[effect]) for effect in Effect))
    console.print(table)
    problems: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in found.findings:
        problems.setdefault((finding.rule, finding.what, finding.mend), []).append(finding)
    for (rule, what, mend), own in problems.items():
        console.print(f"\n[bold]{rule}[/bold]: {escape(what)}")
        for finding in own:
            console.print(f"  {finding.runtime} {finding.effect}: {escape(finding.happens)}")
        console.print(f"  to mend it: {escape(mend)}")
        console.print(f"  checked against: {escape(own[0].source)}")
