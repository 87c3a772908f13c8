"""Floors of the package: every import in every module goes to a lower floor."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "grpo_ext"

#: Floors that each floor may import besides itself. `losses` are the modules directly in grpo_ext/.
KERNELS = {"_ops", "losses", "vocabulary"}
UPDATES = KERNELS | {"linear", "modules", "update"}
RUNS = UPDATES | {"generation", "rollouts", "trainer"}
BELOW = {
    "_ops": {"losses"},
    "losses": {"_ops", "vocabulary"},
    "vocabulary": {"_ops", "losses"},
    "linear": KERNELS,
    "modules": KERNELS | {"linear"},
    "update": UPDATES - {"update"},
    "generation": UPDATES,
    "rollouts": UPDATES | {"generation"},
    "trainer": RUNS - {"trainer"},
    "integrations": UPDATES | {"generation"},
    "tasks": RUNS - {"trainer"},
    "bench": RUNS | {"integrations", "tasks"},
    "cli": RUNS | {"integrations", "tasks", "bench"},
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def floor_of(parts: list[str]) -> str:
    """The floor of a dotted path below grpo_ext: its folder, or ``losses`` for a module at the top."""
    return parts[0] if parts and (PACKAGE / parts[0]).is_dir() else "losses"


def imported(tree: ast.AST) -> list[tuple[int, list[str]]]:
    """Line and path below grpo_ext of each import, those under TYPE_CHECKING and inside functions included."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "grpo_ext":
            rest = node.module.split(".")[1:]
            names = [rest] if rest else [[alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1:] for a in node.names if a.name.split(".")[0] == "grpo_ext"]
        found += [(node.lineno, name) for name in names]
    return found


def test_every_folder_has_its_floor() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders <= BELOW.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    if relative == Path("__init__.py"):
        return  # the public names, from the floors that have them
    own = floor_of(list(relative.with_suffix("").parts))
    allowed = BELOW[own] | {own}
    upwards = [
        f"line {line}: grpo_ext.{'.'.join(name)}" for line, name in imported(ast.parse(path.read_text()))
        if floor_of(name) not in allowed
    ]  # fmt: skip
    assert not upwards, f"{relative} is on the floor {own!r}, which may import {sorted(allowed)}: {upwards}"


def test_an_import_upwards_is_found() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from grpo_ext.trainer import GRPOTrainer\n"
    assert imported(ast.parse(source)) == [(3, ["trainer"])]
    assert floor_of(["trainer"]) == "trainer" not in BELOW["update"]
