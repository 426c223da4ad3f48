"""What the probe of combinations keeps on disk: what it has seen so far, and the table in the source."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from strategies.capabilities import Key, Outcome, format_table, parse_table
from strategies.codec import from_json, to_json

_HEAD = '"""Written by :mod:`tests.e2e.probe_capabilities`; :mod:`strategies.capabilities` says what it means."""\n'


def versions() -> dict[str, str]:
    """What a probe is of."""
    return {name: version(name) for name in ("deepspeed", "torch")}


class State:
    """What has been seen so far: one line of versions, then one line per combination. Other versions start anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table: dict[Key, Outcome] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        if not lines or json.loads(lines[0]) != versions():
            path.write_text(json.dumps(versions()) + "\n")
            return
        for line in lines[1:]:
            row = json.loads(line)
            self.table[Key(**row["key"])] = from_json(Outcome, row["outcome"])

    def add(self, key: Key, found: Outcome) -> None:
        """Keep one."""
        self.table[key] = found
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key._asdict(), "outcome": to_json(found)}) + "\n")


class TableFile:
    """The module with the table.

    Attributes:
        made_with: The versions that it is of; empty if it does not say.
        rows: What is in it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        found = _constants(path.read_text() if path.exists() else "")
        self.made_with: dict[str, str] = found.get("MADE_WITH", {})
        self.rows = parse_table(found.get("TABLE", ""))

    def of_this_deepspeed(self) -> dict[Key, Outcome]:
        """Its rows, if they are of the DeepSpeed that is installed."""
        return self.rows if self.made_with.get("deepspeed") == versions()["deepspeed"] else {}

    def write(self, rows: Mapping[Key, Outcome]) -> None:
        """Replace it by what this DeepSpeed does."""
        made_with = json.dumps(versions())
        table = f'TABLE = """\n{format_table(rows)}"""  # noqa: E501\n'
        self._path.write_text(f"{_HEAD}\nMADE_WITH = {made_with}\n\n{table}")


def _constants(source: str) -> dict[str, Any]:
    """The constants of a module, which is not run."""
    return {
        target.id: ast.literal_eval(statement.value)
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
