"""Which device and dtype `auto` takes."""

import pytest
import torch

from lofit.errors import InputError
from lofit.llm.device import pick_device, pick_dtype


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(InputError, match=f"--device {device}: not usable here"):
        pick_device(device)


@pytest.mark.parametrize(
    ("device", "amx", "avx", "amd", "n_bytes", "cuda", "want"),
    [
        ("cpu", False, False, True, 10**9, True, torch.float32),
        ("cpu", False, True, True, 10**9, False, torch.bfloat16),
        ("cpu", False, True, True, 10**7, False, torch.float32),
        ("cpu", False, True, False, 10**9, False, torch.float32),
        ("cpu", True, False, False, 10**7, False, torch.bfloat16),
        ("cuda:1", False, False, False, 10**7, True, torch.bfloat16),
        ("cuda", True, True, True, 10**9, False, torch.float32),
        ("mps", True, True, True, 10**9, True, torch.float32),
    ],
)
def test_dtype_auto_follows_the_hardware(monkeypatch, device, amx, avx, amd, n_bytes, cuda, want):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr("lofit.llm.device.is_amd", lambda: amd)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: cuda)
    assert pick_dtype("auto", device, n_bytes) == want
    assert pick_dtype("float16", device, n_bytes) == torch.float16
