"""Choose the dtype for ``dtype: auto``: bfloat16 on devices that multiply it in hardware, else float32.

Without hardware support torch converts every number in software, and a product takes several times as long as in
float32.
"""

from __future__ import annotations

import torch

#: Names of torch's CPU capabilities, on x86 and on ARM, that imply bfloat16 products in hardware.
_BF16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def fast_dtype(device: str | None = None) -> tuple[str, str]:
    """Choose the dtype of the weights for a device.

    Args:
        device: ``cpu`` or ``cuda``; None = the GPU if torch sees one.

    Returns:
        (``bfloat16`` or ``float32``, the reason as text for the log).
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        name, able = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        name, able = f"this processor ({torch.backends.cpu.get_cpu_capability()})", _processor_multiplies_bf16()
    return ("bfloat16" if able else "float32"), f"{name} multiplies bfloat16 in {'hardware' if able else 'software'}"


def _processor_multiplies_bf16() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:  # torch 2.10
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    found = capabilities()
    return any(found.get(name) for name in _BF16_PRODUCTS)
