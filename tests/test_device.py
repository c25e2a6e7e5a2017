"""Which device and dtype `auto` takes."""

import subprocess
import sys

import pytest
import torch
from conftest import MINI, REPO
from lofit.llm.device import pick_device, pick_dtype, widest

from lofit.errors import InputError


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(InputError, match=f"--device {device}: not usable here"):
        pick_device(device)


@pytest.mark.parametrize(
    ("device", "amx", "avx", "amd", "n_bytes", "capability", "want"),
    [
        ("cpu", False, False, True, 10**9, None, torch.float32),
        ("cpu", False, True, True, 10**9, None, torch.bfloat16),
        ("cpu", False, True, True, 10**7, None, torch.float32),
        ("cpu", False, True, False, 10**9, None, torch.float32),
        ("cpu", True, False, False, 10**7, None, torch.bfloat16),
        ("cuda:1", False, False, False, 10**7, (8, 0), torch.bfloat16),
        ("cuda", False, False, False, 10**7, (9, 0), torch.bfloat16),
        ("cuda", True, True, True, 10**9, (7, 5), torch.float32),  # a T4 emulates it
        ("mps", True, True, True, 10**9, None, torch.float32),
    ],
)
def test_dtype_auto_follows_the_hardware(
    monkeypatch, device, amx, avx, amd, n_bytes, capability, want
):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr("lofit.llm.device.is_amd", lambda: amd)
    asked = []
    monkeypatch.setattr(
        "torch.cuda.get_device_capability", lambda name: asked.append(name) or capability
    )
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    assert pick_dtype("auto", device, n_bytes) == want
    assert asked == ([device] if device.startswith("cuda") else [])  # of several, that GPU
    assert pick_dtype("float16", device, n_bytes) == torch.float16


def test_the_widest_dtype_of_a_device():
    for name, want in (("mps", torch.float32), ("cpu", torch.float64), ("cuda:1", torch.float64)):
        assert widest(name) == widest(torch.device(name)) == want


MISSING = """
import sys
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
import signal
for name in ("setitimer", "ITIMER_PROF", "SIGPROF"):
    delattr(signal, name)
import lofit
from lofit.llm import batches, chat, device, generate, render, scoring
import train
model, tokenizer = lofit.load_model(FOLDER), lofit.load_tokenizer(FOLDER)
ids = [tokenizer.encode("Q: What is the capital of it? A:")]
assert generate.generate(model, ids, 3, tokenizer.eos_ids)
"""


def test_a_model_loads_without_the_modules_of_unix():
    """As on Windows, where Python has none of them."""
    code = f"FOLDER = {str(MINI)!r}\n" + MISSING
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert ended.returncode == 0, ended.stderr
