"""Trained offsets as something that other programs load, without this one.

    python -m lofit.export runs/mini-llama/mquake --format hf --out exported

RUN is the folder of a run, an adapter folder or hub id, or a checkpoint that the paper released.

    hf       a whole checkpoint, the offsets in it as biases
    gguf     the same as one file for llama.cpp (pip install -e ".[gguf]")
    peft     an adapter that stock peft loads (BEFT, a tuner of biases)
    steered  steering vectors for lm-evaluation-harness, --model steered
    lofit    an adapter for eval.py --offsets
"""

import argparse
import os
import shutil
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError

from lofit.errors import InputError
from lofit.export import gguf
from lofit.export.card import model_card
from lofit.export.check import check, find_prompts
from lofit.export.folding import FoldedBase, fold
from lofit.files import write_json, write_text
from lofit.llm.checkpoint import DTYPES, HF_METADATA, stored_tensors, weight_files
from lofit.llm.files import read_json, save_tensors
from lofit.llm.folder import INDEX, LICENCES
from lofit.llm.tokenizer import load_tokenizer
from lofit.run.adapters import Adapter, open_adapter
from lofit.run.artefacts import OFFSETS, save_offsets

COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "generation_config.json", "preprocessor_config.json", "processor_config.json", *LICENCES,
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lofit.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arg = parser.add_argument
    arg("run", metavar="RUN")
    arg("--format", required=True, choices=WRITERS)
    arg("--out", required=True, type=Path, metavar="DIR", help="a new or an empty folder")
    arg("--model", help="where the base model is now (default: where the run had it)")
    arg("--dtype", choices=DTYPES, help="default: weights as stored, what is added in float32")
    arg("--check", action="store_true", help="see that stock transformers answers alike")
    arg("--push-to-hub", metavar="ID", help="also upload DIR, as owner/name")
    return parser.parse_args(argv)


def write_hf(base: FoldedBase, adapter: Adapter, out: Path) -> None:
    """The base model's files one by one, with a bias on every q, k, v and o: `attention_bias` turns
    on all four together; store zeros for the three that we do not use."""
    weight_map, n_bytes = {}, 0
    paths = weight_files(base.folder)
    for path in paths:
        tensors = {}
        for key, tensor in stored_tensors([path], base.is_kept):
            tensors[key] = base.cast(key, tensor)
            tensors |= base.biases_beside(key)
        save_tensors(out / path.name, tensors, HF_METADATA)
        weight_map |= dict.fromkeys(tensors, path.name)
        n_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(paths) > 1 or (base.folder / INDEX).exists():
        write_json(out / INDEX, {"metadata": {"total_size": n_bytes}, "weight_map": weight_map})
    write_json(out / "config.json", base.hf_config())
    for pattern in COPIED:
        for path in filter(Path.is_file, base.folder.glob(pattern)):
            check_inside(path, base.folder)
            shutil.copyfile(path, out / path.name)
    write_ending(base, adapter, out)


def write_ending(base: FoldedBase, adapter: Adapter, out: Path) -> None:
    """Name in generation_config.json the tokens that end an answer to a chat prompt here, so that a
    server stops where eval.py did. Other answers end where the base's own files say."""
    if adapter.info.get("chat"):
        path = out / "generation_config.json"
        settings = read_json(path) if path.exists() else {}
        eos_ids = load_tokenizer(base.folder, None, add_special_tokens=False).eos_ids
        write_json(path, settings | {"eos_token_id": list(eos_ids)})


def check_inside(path: Path, folder: Path) -> None:
    """InputError for a link that leaves a model's folder (or, in the hub's cache, its repository):
    an export is made to be given away, and must not take along what lies elsewhere."""
    root = folder.resolve()
    root = root.parent.parent if root.parent.name == "snapshots" else root
    if not path.resolve().is_relative_to(root):
        raise InputError(
            f"{path}: a link that leaves the folder; replace it by the file, or remove it"
        )


def write_peft(base: FoldedBase, adapter: Adapter, out: Path) -> None:
    """adapter_config.json and adapter_model.safetensors of peft's BEFT (peft >= 0.21.2), for the
    edited layers alone."""
    tensors = {
        f"base_model.model.{base.prefix}layers.{layer}.self_attn.o_proj.beft_bias": vector[None]
        for layer, vector in base.vectors.items()
    }
    save_tensors(out / "adapter_model.safetensors", tensors, HF_METADATA)
    config = {
        "peft_type": "BEFT",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "inference_mode": True,
        "target_modules": [f"layers.{layer}.self_attn.o_proj" for layer in base.shifts],
    }
    write_json(out / "adapter_config.json", config)


def write_steered(base: FoldedBase, adapter: Adapter, out: Path) -> None:
    """steering.pt: what to add at the output of each edited layer's o_proj."""
    prefix = base.prefix.removeprefix("model.")  # lm-eval looks for them from the body on
    vectors = {
        f"{prefix}layers.{layer}.self_attn.o_proj": {
            "steering_vector": vector,
            "steering_coefficient": 1.0,
            "action": "add",
            "bias": None,
            "head_index": None,
        }
        for layer, vector in base.vectors.items()
    }
    torch.save(vectors, out / "steering.pt")


def write_lofit(base: FoldedBase, adapter: Adapter, out: Path) -> None:
    """offsets.safetensors and lofit_config.json."""
    info = adapter.info | {"fingerprint": base.fingerprint}
    save_offsets(out / OFFSETS, adapter.heads, adapter.offsets, info)


def write_gguf(base: FoldedBase, adapter: Adapter, out: Path) -> None:
    """model.gguf, by way of a checkpoint that does not stay."""
    gguf.check_gguf(base)
    checkpoint = out / "checkpoint"
    checkpoint.mkdir()
    write_hf(base, adapter, checkpoint)
    gguf.convert(base, checkpoint, out / gguf.MODEL)
    for pattern in LICENCES:
        for path in checkpoint.glob(pattern):
            path.rename(out / path.name)
    shutil.rmtree(checkpoint)


WRITERS = {
    "hf": write_hf, "gguf": write_gguf, "peft": write_peft, "steered": write_steered,
    "lofit": write_lofit,
}  # fmt: skip


def export(args: argparse.Namespace) -> None:
    """Write DIR, whole or not at all."""
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"--out {args.out}: not an empty folder; name a new one")
    if args.format == "lofit" and args.dtype:
        raise InputError("--dtype: offsets are float32 in this project's own format; leave it out")
    if args.push_to_hub:
        check_hub(args.push_to_hub)
    adapter, checked = open_adapter(args.run), None
    if args.check:
        find_prompts(adapter, args.format)
    base = fold(adapter, args.run, args.model, args.dtype and DTYPES[args.dtype])
    partial = args.out.absolute().with_name(f".{args.out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        WRITERS[args.format](base, adapter, partial)
        if args.check:
            checked = check(base, adapter, args.run, args.format, partial)
        name = args.push_to_hub or args.out.name
        write_text(partial / "README.md", model_card(base, adapter, args.format, name, checked))
        if args.out.exists():
            args.out.rmdir()
        partial.rename(args.out)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{args.out}: cannot be written ({why})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(
        f"{len(adapter.heads)} offsets in {len(base.shifts)} layers of {base.name}"
        f" -> {args.out} ({args.format}, {size:,} bytes)"
    )
    if checked:
        print(checked)


def check_hub(repo: str) -> None:
    """InputError before any work unless the name is one and a token is there."""
    try:
        huggingface_hub.utils.validate_repo_id(repo)
        huggingface_hub.HfApi().whoami()
    except (hub_errors.HFValidationError, hub_errors.HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(f"--push-to-hub {repo}: {_first_line(error)}; set HF_TOKEN?") from None


def push(folder: Path, repo: str) -> None:
    """Upload a folder as a model repository, made if need be. InputError if that fails."""
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except (hub_errors.HfHubHTTPError, OSError) as error:
        raise InputError(
            f"--push-to-hub {repo}: {_first_line(error)}; {folder} is complete: upload it with"
            f" `hf upload {repo} {folder}`"
        ) from None
    print(f"-> {url}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    export(args)
    if args.push_to_hub:
        push(args.out, args.push_to_hub)
