"""The device and the dtype of a model: what `auto` stands for, and what the hardware has."""

from pathlib import Path

import torch

from lofit.errors import InputError
from lofit.llm.checkpoint import DTYPES

AMPERE = (8, 0)  # the first GPUs that compute in bfloat16; older ones emulate it
LARGE = 100 * 10**6  # bytes of weights, see `pick_dtype`


def pick_device(name: str) -> str:
    """auto -> cuda where there is one, else cpu. InputError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device {name}: not usable here ({str(error).splitlines()[0]})"
        ) from None
    return name


def widest(device: str | torch.device) -> torch.dtype:
    """float64, where sums lose nothing; float32 on Apple's GPUs, which have no more."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def pick_dtype(name: str, device: str, n_bytes: int) -> torch.dtype:
    """auto -> bfloat16 where it is faster for weights of so many bytes as stored, else float32.

    That is where matrix units compute it (a GPU from Ampere on, a CPU with AMX), and on AMD's CPUs
    with AVX512-bf16 for models that are not tiny: 1.4 to 1.8 times as fast at 0.1 to 0.3 B
    parameters, but 0.7 to 0.9 times at the miniatures' 6 M. An Intel CPU with AVX512-bf16 and no
    AMX was 0.6 and 0.4 times as fast (tests/measure/dtype.py).
    """
    if name != "auto":
        return DTYPES[name]
    if device == "cpu":
        fast = torch.cpu._is_amx_tile_supported()
        fast = fast or (n_bytes >= LARGE and is_amd() and torch.cpu._is_avx512_bf16_supported())
    else:
        fast = device.startswith("cuda") and torch.cuda.get_device_capability(device) >= AMPERE
    return torch.bfloat16 if fast else torch.float32


def is_amd() -> bool:
    """Whether the CPU is AMD's; False where the system does not say."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
