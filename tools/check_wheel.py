"""Test wheels outside the source tree, each in a new environment: `make check-wheel`.

    python tools/check_wheel.py dist/cpu/*cp311*.whl --torch 2.13.0

An environment contains only the wheel, torch, pytest and hypothesis. It runs the tests that need no more: losses,
operators, losses from hidden states, random cases. pip chooses the source of torch (PIP_INDEX_URL; PyPI's builds for
x86 need gigabytes of CUDA libraries). --environment uses an existing environment with torch. pytest receives all
other arguments.
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
    """Create an environment with the wheel's CPython version."""
    tag = re.search(r"-cp3(\d+)-", wheel.name)
    if tag is None:
        sys.exit(f"{wheel.name} is not a wheel for CPython 3")
    interpreter = interpreter_of(f"3.{tag[1]}")
    if interpreter is None:
        sys.exit(f"{wheel.name}: CPython 3.{tag[1]} is not installed")
    folder = WORK / "check" / f"cp3{tag[1]}"
    shutil.rmtree(folder, ignore_errors=True)
    run(interpreter, "-m", "venv", folder)
    return folder


def tree() -> Path:
    """Copy the tests and the files they read, but not the package, which must come from the wheel."""
    folder = WORK / "check" / "tree"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("tests", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def check(wheel: Path, folder: Path, torch: str | None, arguments: list[str]) -> int:
    """Install the wheel into an environment, run the tests, and return pytest's exit status."""
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
        sys.exit(f"the tests would import another package than the wheel's in {folder}")
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not grid", *TESTS, *arguments]
    return subprocess.run(command, cwd=source, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--torch", help="torch version to install; default: pip's choice")
    parser.add_argument("--environment", type=Path, help="an existing environment with torch, instead of a new one")
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
