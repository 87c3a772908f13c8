"""Version, CPU instruction set and CUDA architectures of the compiled extension."""

from __future__ import annotations

from grpo_ext import _C

__version__: str = _C.VERSION


def build_info() -> dict[str, object]:
    """Describe the compiled extension.

    Returns:
        dict: ``version``; ``cpu_isa``, the instruction set of the CPU kernels in use (``avx512``, ``avx2`` or
        ``portable``); ``cuda_version``, e.g. ``"13.0"``, or None for a CPU-only build; ``cuda_architectures``, a list
        of the architectures compiled in.
    """
    cuda = _C.CUDA_VERSION
    return {
        "version": _C.VERSION,
        "cpu_isa": _C.cpu_isa(),
        "cuda_version": f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        "cuda_architectures": [name for name in _C.CUDA_ARCHITECTURES.split(",") if name],
    }
