"""A pytest plugin: the tests run on the extension that GRPO_EXT_LIBRARY names, instead of the installed one.

`make sanitize` builds that library with AddressSanitizer and UBSan, for the CPU, and runs tests under it.
"""

from __future__ import annotations

import importlib.util
import os
import sys


def load(path: str) -> None:
    """Put the library in the place of ``grpo_ext._C``, before anything imports it.

    Raises:
        RuntimeError: too late, or no library there.
    """
    if "grpo_ext._C" in sys.modules:
        raise RuntimeError("grpo_ext is imported already: pass -p sanitized_extension to pytest")
    spec = importlib.util.spec_from_file_location("grpo_ext._C", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    sys.modules["grpo_ext._C"] = module
    spec.loader.exec_module(module)


load(os.environ["GRPO_EXT_LIBRARY"])


def pytest_report_header() -> str:
    import grpo_ext._C as extension

    return f"sanitized extension: {extension.__file__}"
