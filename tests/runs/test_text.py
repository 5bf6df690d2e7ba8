"""Names from files may hold anything; what reaches a terminal or a log is harmless, short, and still JSON."""

import json

import pytest

from moepress.runs.text import LONGEST, cut, message, one_line, printable, suggestion


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer \x1b]0;owned\x07", "layer \\x1b]0;owned\\x07"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("one\ntwo", "one\\ntwo"),
        ("half \ud800 pair", "half \\ud800 pair"),
        ("turned \u202e txt.exe", "turned \\u202e txt.exe"),
        ("a\u2028b", "a\\u2028b"),
        ("c1 \x9b31m", "c1 \\x9b31m"),
        ("Grüße, 日本語, −5 %, a\u00a0b", "Grüße, 日本語, −5 %, a\u00a0b"),
    ],
)
def test_what_a_terminal_obeys_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
    shown.encode()


def test_lines_and_tabs_stay_where_there_may_be_several() -> None:
    assert printable("a\n\tb\r", lines=True) == "a\n\tb\\r"


def test_a_long_message_keeps_its_beginning_and_what_to_do() -> None:
    said = message("config.json holds " + "x" * 100_000 + "; mend it.")
    assert len(said) < LONGEST + 100
    assert said.startswith("config.json holds xxx")
    assert said.endswith("; mend it.")
    assert "characters are left out" in said
    assert message("short; mend it.") == "short; mend it."


def test_values_are_cut_and_never_fail() -> None:
    assert cut("x" * 1000) == "'" + "x" * 76 + "..."
    assert cut(3) == "3"
    assert "too large" in cut(10**5000)


def test_errors_of_other_libraries_are_one_line() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert one_line(ValueError("1 validation error for X\n  field\n    is wrong.")) == (
        "1 validation error for X field is wrong"
    )
    assert len(one_line(ValueError("y" * 5000))) == 300
    assert one_line(MuteError()) == "MuteError"


def test_only_near_names_are_suggested() -> None:
    assert suggestion("criterium", ["criterion", "keep"]) == " (did you mean criterion?)"
    assert suggestion("RTX-4091", ["rtx-4090", "rtx-3090"]) == " (did you mean rtx-4090?)"
    assert suggestion("zebra", ["criterion", "keep"]) == ""


def test_json_stays_json_whatever_a_name_holds(capsys: pytest.CaptureFixture[str]) -> None:
    from moepress.commands.console import emit

    data = {"domain": "evil \x9b31m \u202e \ud800 ü"}
    emit(data)
    out = capsys.readouterr().out
    assert json.loads(out) == data
    assert printable(out, lines=True) == out


def test_tables_and_consoles_print_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    from moepress.commands.tables import plain_console, plain_table

    table = plain_table("domain", "share")
    table.add_row("evil\x1b]0;owned\x07", "1 %")
    console = plain_console()
    console.print(table)
    console.print("name \x1b[2J\nnext")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "evil\\x1b]0;owned\\x07" in out
