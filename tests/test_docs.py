"""The documents against the code: commands parse, options exist, links resolve, and nothing is left undescribed.

No command is run here: click parses the arguments and stops before the function. test_doc_commands.py runs them.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from documents import DOCUMENTS, FENCE, ROOT, blocks, commands_of, name_of
from pydantic import BaseModel

from moepress.calibration.accumulators import ACCUMULATORS, TOTALS
from moepress.calibration.hessian import HessianOptions
from moepress.cli import cli
from moepress.compress.gptq.options import SolverOptions
from moepress.compress.pruning.plan import Plan
from moepress.compress.pruning.scoring import Criterion
from moepress.models.families.table import FAMILIES
from moepress.stages.run.recipe import Recipe
from moepress.validation.report.schema import Report

INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\[(?:[^\]\\]|\\.)*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
OTHER_TOOLS = {"--no-deps", "--no-build-isolation", "--editable", "--constraint", "--import-mode", "--n-cpu-moe"}


def inline_code(text: str) -> Iterator[str]:
    for found in INLINE.finditer(FENCE.sub("", text)):
        yield found[1].strip()


def help_texts(command: click.Command, name: str = "moepress") -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for inner, sub in command.commands.items():
            yield from help_texts(sub, f"{name} {inner}")


COMMANDS = dict(help_texts(cli))


def examples(text: str) -> Iterator[str]:
    """Lines of a help text that show a command; a backspace character keeps click from rewrapping them."""
    for paragraph in text.split("\n\n"):
        if "\b" in paragraph:
            block = "\n".join(line.strip().removeprefix("Example:").strip() for line in paragraph.splitlines())
            yield from commands_of(re.sub(r"\\\n\s*", " ", block))


def all_options() -> set[str]:
    names = {"-h", "--help"}
    for command in COMMANDS.values():
        names |= {n for p in command.params if isinstance(p, click.Option) for n in (*p.opts, *p.secondary_opts)}
    return names


def parse(text: str) -> None:
    """Let click parse a command; raises what click raises when it is wrong."""
    words = shlex.split(text, comments=True)[1:]
    try:
        if words and words[0] in cli.commands:
            # With the group's own settings, for click keeps the help option that it makes from them.
            parent = click.Context(cli, info_name="moepress", **cli.context_settings)
            cli.commands[words[0]].make_context(words[0], words[1:], parent=parent)
        elif words:
            context = cli.make_context("moepress", words)
            cli.resolve_command(context, words)
    except click.exceptions.Exit:  # --help and --version
        return


def check_words(text: str) -> None:
    """For a command that is only spoken of: it exists, and so do its options; required ones may be missing."""
    words = [word for word in text.split()[1:] if word not in {"...", "…"}]
    if not words or words[0].isupper():  # `moepress COMMAND -h`
        return
    command: click.Command = cli
    if not words[0].startswith("-"):
        assert words[0] in cli.commands, f"`{text}`: there is no command {words[0]}"
        command = cli.commands[words[0]]
        if isinstance(command, click.Group) and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in command.commands, f"`{text}`: there is no command {words[0]} {words[1]}"
            command = command.commands[words[1]]
    known = {n for p in command.params for n in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}
    for word in words:
        option = word.split("=")[0]
        assert not option.startswith("-") or option in known, f"`{text}`: there is no option {option}"


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).strip().lower()).replace(" ", "-")


def anchors(document: Path) -> set[str]:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    return {slug(line.lstrip("#")) for line in text.splitlines() if re.match(r"#{1,6} ", line)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_command_in_a_code_block_parses(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(document.read_text(encoding="utf-8")):
        for command in commands_of(block):
            if re.search(r"\.\.\.|…|\[", command):  # a sketch of a command, not one to copy
                check_words(re.sub(r"\[|\]", "", command))
                continue
            try:
                parse(command)
            except click.ClickException as error:
                pytest.fail(f"{name_of(document)}: `{command}`: {error.format_message()}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_command_and_option_spoken_of_exists(document: Path) -> None:
    known = all_options() | OTHER_TOOLS
    for code in inline_code(document.read_text(encoding="utf-8")):
        if code == "moepress" or code.startswith("moepress "):
            check_words(code)
        elif code.startswith("--"):
            assert re.split(r"[ =]", code)[0] in known, f"{name_of(document)}: `{code}` is no option of any command"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_in_a_help_text_parses(name: str) -> None:
    found = list(examples(COMMANDS[name].help or ""))
    assert found, f"the help of {name} shows no example"
    for command in found:
        try:
            parse(command)
        except click.ClickException as error:
            pytest.fail(f"{name} --help: `{command}`: {error.format_message()}")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name: str) -> None:
    for parameter in COMMANDS[name].params:
        assert not isinstance(parameter, click.Option) or parameter.help, f"{name}: {parameter.opts}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_internal_links_resolve(document: Path) -> None:
    for target in LINK.findall(FENCE.sub("", document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z][a-z+.-]*:", target):
            continue
        place, _, anchor = target.partition("#")
        file = (document.parent / place).resolve() if place else document
        assert file.exists(), f"{name_of(document)} links to {target}, which is not there"
        assert file.is_relative_to(ROOT), f"{name_of(document)} links to {target}, outside of the repository"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{name_of(document)} links to {target}, and {place} has no such heading"


def test_the_architecture_has_a_line_for_every_package() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rooms = text.split("## Rooms")[1].split("\n## ")[0]
    named = {name.rstrip("/") for name in re.findall(r"^ {4,6}([\w/]+/)(?: |$)", rooms, re.MULTILINE)}
    packages = {p.parent.relative_to(ROOT) for p in ROOT.glob("*/__init__.py")}
    packages |= {p.parent.relative_to(ROOT) for p in ROOT.glob("*/*/__init__.py") if p.parts[-3] != ".typing"}
    lacking = sorted(str(p) for p in packages if p.name not in named and p.name not in {"moepress", "."})
    assert lacking == [], f"add a line to ARCHITECTURE.md for {lacking}"
    strange = sorted(named - {p.name for p in packages} - {"tests"})
    assert strange == [], f"ARCHITECTURE.md names {strange}, which are not there"
    assert len(text.splitlines()) < 120


def test_every_path_that_the_architecture_names_is_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    paths = {p for p in re.findall(r"`((?:[\w.]+/)+[\w.]*)`", text) if "NAME" not in p}
    assert paths
    assert sorted(p for p in paths if not (ROOT / p).exists()) == []


@pytest.mark.parametrize(
    ("heading", "model"), [("## plan.json", Plan), ("### recipe.yaml", Recipe), ("## Report", Report)]
)
def test_every_field_of_a_file_is_described(heading: str, model: type[BaseModel]) -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    section = text.split(f"\n{heading}\n")[1].split("\n## ")[0]
    assert [n for n in model.model_fields if f"`{n}`" not in section] == []


def test_every_statistic_of_a_profile_is_described() -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert [n for n in (*ACCUMULATORS, *TOTALS) if f"`{n}`" not in text] == []


def test_every_criterion_has_its_formula() -> None:
    text = (ROOT / "docs" / "formulas.md").read_text(encoding="utf-8")
    assert [c.value for c in Criterion if f"| `{c.value}` |" not in text] == []


def test_every_family_has_its_routing_rule() -> None:
    text = (ROOT / "docs" / "formulas.md").read_text(encoding="utf-8")
    assert [name for name in FAMILIES if f"`{name}`" not in text] == []


def test_the_defaults_of_the_solver_are_the_ones_described() -> None:
    text = (ROOT / "docs" / "formulas.md").read_text(encoding="utf-8")
    assert f"τ = {HessianOptions().shrinkage_tokens:g}." in text
    assert f"Damping: {100 * SolverOptions().damp:g} % of mean(diag H)" in text
