"""Tests wheels away from the source tree, each in an environment of its own: `make check-wheel`.

    python tools/check_wheel.py dist/cpu/*cp311*.whl --torch 2.13.0

An environment gets the wheel, torch and pytest, nothing else, and the tests that need no more: losses, operators,
losses from hidden states, random cases. Where torch comes from is pip's business (PIP_INDEX_URL; on PyPI the builds for
x86 need gigabytes of CUDA libraries). --environment takes one that holds torch already. Other arguments are pytest's.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from wheels import ROOT, WORK, interpreter_of, run

TESTS = ("tests/losses", "tests/ops", "tests/linear", "tests/fuzz")
NEEDED = ("pytest", "pytest-timeout", "hypothesis")
IMPORTED = "import grpo_ext, torch; print(grpo_ext.__file__, 'torch', torch.__version__, grpo_ext.build_info())"


def environment(wheel: Path) -> Path:
    """A new one of the wheel's CPython."""
    tag = re.search(r"-cp3(\d+)-", wheel.name)
    if tag is None:
        sys.exit(f"{wheel.name} is no wheel of a CPython 3")
    interpreter = interpreter_of(f"3.{tag[1]}")
    if interpreter is None:
        sys.exit(f"{wheel.name}: no CPython 3.{tag[1]} here")
    folder = WORK / "check" / f"cp3{tag[1]}"
    shutil.rmtree(folder, ignore_errors=True)
    run(interpreter, "-m", "venv", folder)
    return folder


def tree() -> Path:
    """The tests and what they read, without the package: it has to come from the wheel."""
    folder = WORK / "check" / "tree"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("tests", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def check(wheel: Path, folder: Path, torch: str | None, arguments: list[str]) -> int:
    """Install the wheel into an environment and run the tests there; pytest's exit status."""
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "-q")
    if torch is not None:
        run(*pip, torch)
    run(*pip, *NEEDED)
    run(*pip, "--no-deps", "--force-reinstall", wheel)
    source = tree()
    where = subprocess.run([python, "-c", IMPORTED], cwd=source, capture_output=True, text=True, check=True).stdout
    print(where.strip(), flush=True)
    if not where.startswith(str(folder)):
        sys.exit("that is not the wheel's package")
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not grid", *TESTS, *arguments]
    return subprocess.run(command, cwd=source, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--torch", help="version to install; default: the one that pip chooses")
    parser.add_argument("--environment", type=Path, help="one that holds torch, instead of a new one")
    options, arguments = parser.parse_known_args()
    failed = []
    for wheel in options.wheels:
        wheel = wheel.resolve()
        if options.environment:
            status = check(wheel, options.environment.absolute(), None, arguments)
        else:
            status = check(
                wheel, environment(wheel), f"torch=={options.torch}" if options.torch else "torch", arguments
            )
        if status:
            failed.append(wheel.name)
    if failed:
        sys.exit(f"tests failed with {', '.join(failed)}")


if __name__ == "__main__":
    main()
