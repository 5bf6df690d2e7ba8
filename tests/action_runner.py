"""Runs a composite action's steps in order, as a GitHub runner would: expressions, conditions, files for outputs.

Steps with `run` are really run by bash. Steps with `uses` are other people's actions: they are only written down.
"""

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")


@dataclass(slots=True, kw_only=True)
class Job:
    """What a job of GitHub Actions is as seen from inside of an action; `used` are the steps that were not run here."""

    workspace: Path
    temporary: Path
    action: Path
    inputs: Mapping[str, str]
    python: Path
    failed: int = 0
    errors: str = ""
    path: str = field(default_factory=lambda: os.environ["PATH"])
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    used: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    @property
    def summary(self) -> Path:
        return self.temporary / "summary.md"

    def value(self, expression: str) -> str:
        """What an expression such as `inputs.model` stands for; unknown outputs are empty, as on GitHub."""
        kind, *names = expression.split(".")
        if kind == "inputs":
            return self.inputs[names[0]]
        if kind == "steps":
            assert names[1] == "outputs"
            return self.outputs.get(names[0], {}).get(names[2], "")
        assert kind == "github"
        return {"run_id": "77", "run_attempt": "1"}[names[0]]

    def filled(self, text: str) -> str:
        return EXPRESSION.sub(lambda found: self.value(found[1]), text)

    def wanted(self, condition: str | None) -> bool:
        """Whether a step is run: terms joined by &&, of the forms that action.yml uses."""
        terms = [] if condition is None else [term.strip() for term in condition.split("&&")]
        if "always()" in terms:
            terms.remove("always()")
        elif self.failed:
            return False
        for term in terms:
            found = re.fullmatch(r"([\w.-]+) (==|!=) '([^']*)'", term)
            assert found, f"this runner cannot read {term}"
            if (self.value(found[1]) == found[3]) != (found[2] == "=="):
                return False
        return True

    def run(self, steps: list[dict[str, Any]]) -> None:
        for step in steps:
            if not self.wanted(step.get("if")):
                continue
            if "uses" in step:
                values = {name: self.filled(str(text)) for name, text in step.get("with", {}).items()}
                self.used.append((step["uses"], values))
                if step["uses"].startswith("actions/setup-python@"):
                    self.outputs[step["id"]] = {"python-path": str(self.python)}
            else:
                self._bash(step)

    def _bash(self, step: dict[str, Any]) -> None:
        assert step["shell"] == "bash"
        files = {name: self.temporary / name for name in ("GITHUB_OUTPUT", "GITHUB_PATH")}
        for file in files.values():
            file.write_text("")
        environment = os.environ | {name: self.filled(text) for name, text in step.get("env", {}).items()}
        environment |= {name: str(file) for name, file in files.items()}
        environment |= {"GITHUB_STEP_SUMMARY": str(self.summary), "GITHUB_ACTION_PATH": str(self.action)}
        environment |= {"RUNNER_TEMP": str(self.temporary), "PATH": self.path}
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(command, cwd=self.workspace, env=environment, capture_output=True, text=True, check=False)
        self.errors += done.stderr
        self.failed = self.failed or done.returncode
        for line in files["GITHUB_PATH"].read_text().splitlines():
            self.path = f"{line}{os.pathsep}{self.path}"
        pairs = (line.partition("=") for line in files["GITHUB_OUTPUT"].read_text().splitlines())
        if "id" in step:
            self.outputs[step["id"]] = {name: value for name, _, value in pairs}
