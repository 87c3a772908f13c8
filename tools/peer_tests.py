"""Run the tests of Liger-Kernel and TRL on this package: ``python -m pytest -p peer_tests``, with tools/ on PYTHONPATH.

``--ours liger`` replaces Liger's classes by the drop-ins. ``--ours stock,patch,fuse`` runs each of TRL's tests with
unpatched TRL, with ``patch()`` and with ``patch(fuse_loss=True)``. For TRL, set HF_HOME to the folder from
tools/trl_hub.py, which replaces the hub. docs/integrations/peer_tests.md has the commands and the results.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MODES = ("stock", "patch", "fuse")
STOCK_FAILED = pytest.StashKey[set[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peer tests")
    group.addoption("--ours", default="", help=f"liger, or for TRL a list of {', '.join(MODES)}; default: none")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STOCK_FAILED] = set()
    if config.getoption("--ours") == "liger":
        replace_liger()
    elif config.getoption("--ours"):
        serve_datasets(Path(os.environ["HF_HOME"]).resolve() / "datasets")
        complete_import_utils()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    modes = [mode for mode in metafunc.config.getoption("--ours").split(",") if mode in MODES]
    if modes and "ours" in metafunc.fixturenames:
        metafunc.parametrize("ours", modes, indirect=True)


@pytest.fixture(autouse=True)
def ours(request: pytest.FixtureRequest) -> Iterator[None]:
    """Patch TRL for one test, and record the patch's status in the report."""
    mode = getattr(request, "param", "stock")
    if mode == "stock":
        yield
        return
    if without_mode(request.node.nodeid) in request.config.stash[STOCK_FAILED]:
        pytest.skip("unpatched TRL does not pass")
    import grpo_ext.integrations.trl as trl

    trl.patch(fuse_loss=mode == "fuse")
    try:
        yield
    finally:
        request.node.user_properties.append(("grpo_ext", str(trl.status())))
        trl.unpatch()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep all modes of a test on one worker, which knows whether unpatched TRL passed."""
    if config.getoption("--ours") in ("", "liger"):
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByTest(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return without_mode(nodeid)

    return ByTest(config, log)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    outcome = yield
    stock = getattr(item, "callspec", None) is None or item.callspec.params.get("ours", "stock") == "stock"
    if stock and not outcome.get_result().passed:
        item.config.stash[STOCK_FAILED].add(without_mode(item.nodeid))


def without_mode(name: str) -> str:
    """A test's id without the mode."""
    for mode in MODES:
        name = name.replace(f"[{mode}]", "").replace(f"[{mode}-", "[").replace(f"-{mode}]", "]")
    return name


def replace_liger() -> None:
    """Replace Liger's classes by this package's drop-ins in all modules that Liger's tests import."""
    import liger_kernel.chunked_loss
    import liger_kernel.chunked_loss.grpo_loss
    import liger_kernel.ops.grpo_loss
    import liger_kernel.transformers.grpo_loss

    from grpo_ext.integrations import liger

    for module in (
        liger_kernel.chunked_loss, liger_kernel.chunked_loss.grpo_loss,
        liger_kernel.ops.grpo_loss, liger_kernel.transformers.grpo_loss,
    ):  # fmt: skip
        for name in liger.__all__:
            if hasattr(module, name):
                setattr(module, name, getattr(liger, name))


def complete_import_utils() -> None:
    """Add ``is_..._available`` functions to TRL that tests of a slightly different version import."""
    from trl import import_utils

    for package in ("harbor", "jmespath", "joblib", "liger_kernel", "math_verify", "mergekit", "openreward", "vllm"):
        name = f"is_{package}_available"
        if not hasattr(import_utils, name):
            found = importlib.util.find_spec(package) is not None
            setattr(import_utils, name, lambda *_, found=found: found)


def serve_datasets(folder: Path) -> None:
    """Patch ``datasets.load_dataset`` to read the saved data sets, before a test file imports it."""
    import datasets

    own = datasets.load_dataset

    def load_dataset(path: str, name: str = "default", *args: Any, split: str | None = None, **options: Any) -> Any:
        saved = folder / path / name
        if not saved.is_dir():
            return own(path, name, *args, split=split, **options)
        found = datasets.load_from_disk(str(saved))
        if options.get("streaming"):
            found = datasets.IterableDatasetDict({key: part.to_iterable_dataset() for key, part in found.items()})
        return found if split is None else found[split]

    datasets.load_dataset = load_dataset


def outcomes(report: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """Read a JUnit XML file: test → mode → (outcome, first line of the message or the patch's status)."""
    from xml.etree import ElementTree

    found: dict[str, dict[str, tuple[str, str]]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if "classname" not in case.attrib:  # the test that an interrupted run was in
            continue
        node = case.attrib["classname"].split(".")[-1] + "::" + case.attrib["name"]
        mode = next((m for m in MODES if f"[{m}]" in node or f"[{m}-" in node or f"-{m}]" in node), "ours")
        counted = [item.attrib["value"] for item in case.iter("property") if item.attrib["name"] == "grpo_ext"]
        outcome, note = "passed", " ".join(counted)
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = {"skipped": "skipped"}.get(child.tag, "failed")
                note = (child.attrib.get("message") or "").split("\n")[0]
        found.setdefault(without_mode(node), {})[mode] = outcome, note
    return found


def main() -> None:
    """Print a CSV of all outcomes. On stderr, print counts, and each test that passes only with unpatched TRL."""
    import csv
    import sys
    from collections import Counter

    writer = csv.writer(sys.stdout)
    writer.writerow(["report", "test", "mode", "outcome", "note"])
    for report in map(Path, sys.argv[1:]):
        counts: Counter[str] = Counter()
        for test, modes in outcomes(report).items():
            for mode, (outcome, note) in modes.items():
                writer.writerow([report.stem, test, mode, outcome, note])
                counts[f"{mode} {outcome}"] += 1
                if outcome == "failed" and modes.get("stock", ("passed",))[0] == "passed":
                    print(f"{report.stem}: {test} [{mode}] {note}", file=sys.stderr)
        print(f"{report.stem}: " + ", ".join(f"{n} {name}" for name, n in sorted(counts.items())), file=sys.stderr)


if __name__ == "__main__":
    main()
