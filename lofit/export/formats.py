"""Write a tuned model in a form that other programs load without this one.

python -m lofit.export runs/mini-llama/mquake --format hf --out exported

hf       a whole checkpoint, with the offsets as biases
gguf     the same in one file, for llama.cpp (pip install -e ".[gguf]")
peft     an adapter for stock peft, of its type BEFT, a tuner of biases; a run of
         `train.py --method lora` becomes a LoRA
"""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

from lofit.compare.baselines import METHODS, TARGETS
from lofit.errors import InputError
from lofit.export import gguf
from lofit.export.card import model_card
from lofit.export.check import check, find_prompts
from lofit.export.folding import fold, shifts
from lofit.files import read_json, write, write_json
from lofit.llm.chat import load_chat_template
from lofit.llm.checkpoint import DTYPES, HEAD
from lofit.llm.hub import LICENCES, commit_of, find_folder
from lofit.llm.save import hf_config, save_weights
from lofit.llm.tokenizer import load_tokenizer
from lofit.run.files import edit_tensors
from lofit.run.tuned import Tuned, open_tuned

LORAS = ("lora", "lora_rank1")
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "generation_config.json", *LICENCES,
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lofit.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arg = parser.add_argument
    arg("run", metavar="RUN", help="a run folder, an adapter folder or a hub id")
    arg("--format", required=True, choices=WRITERS, help="what to write: see above")
    arg("--out", required=True, type=Path, metavar="DIR", help="where to: a new or an empty folder")
    arg("--model", help="where the base model is now (default: where the run had it)")
    arg("--dtype", choices=DTYPES, help="of the weights written (default: the run's)")
    arg("--check", action="store_true", help="ask stock transformers 20 prompts of the run's"
        " predictions.jsonl, and write nothing if its answers differ from the tuned model's"
        " (default: no check)")  # fmt: skip
    arg("--push-to-hub", metavar="ID", help="upload DIR to the hub as owner/name (default: do not)")
    return parser.parse_args(argv)


def write_hf(tuned: Tuned, out: Path) -> None:
    """Write config.json, weights in shards of 5 GB, and the base's tokenizer, generation settings
    and licences."""
    base, model = find_folder(tuned.base), fold(tuned.model)
    raw = read_json(base / "config.json")
    weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights[HEAD]
    huggingface_hub.save_torch_state_dict(weights, out)
    name = str(model.lm_head.weight.dtype).removeprefix("torch.")
    config = hf_config(model.config) | {"dtype": name, "torch_dtype": name}
    # the base's other keys change no logit, but a program may look for them
    same = raw["model_type"] == model.config.model_type
    write_json(out / "config.json", (raw if same else {}) | config)
    for path in out.glob("*.safetensors"):  # safetensors makes them unreadable for anybody else
        path.chmod((out / "config.json").stat().st_mode)
    # an export is given away: a link in the base's folder must not take along what lies elsewhere
    root = base.resolve()
    root = root.parent.parent if commit_of(root) else root  # links of the hub's cache lead there
    for path in (path for pattern in COPIED for path in base.glob(pattern) if path.is_file()):
        if not path.resolve().is_relative_to(root):
            raise InputError(f"{path}: a link that leaves the folder; put the file in its place")
        shutil.copyfile(path, out / path.name)
    if tuned.info.get("chat"):  # a server is to stop where eval.py did
        path = out / "generation_config.json"
        settings = read_json(path) if path.exists() else {}
        eos_ids = load_tokenizer(base, load_chat_template(base)[1]).eos_ids
        write_json(path, settings | {"eos_token_id": list(eos_ids)})


def write_peft(tuned: Tuned, out: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, in float32."""
    source, raw = tuned.model.source, read_json(find_folder(tuned.base) / "config.json")
    # where transformers keeps the layers of a text model, and of one that sees images
    stem = f"base_model.model.model.{'language_model.' if 'text_config' in raw else ''}"
    if tuned.method in LORAS:
        rank = METHODS[tuned.method].edit.rank
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0}
        config |= {"target_modules": list(TARGETS), "bias": "none"}
        tensors = {}
        for key, tensor in edit_tensors(tuned.model).items():  # layers.3.q_proj_A
            layer, name = key.rsplit(".", 1)
            module, part = name.rsplit("_", 1)
            tensors[f"{stem}{layer}.self_attn.{module}.lora_{part}.weight"] = tensor
    else:  # BEFT (peft >= 0.21.2): a bias on what a module returns
        modules = {f"layers.{i}.self_attn.o_proj": v for i, v in shifts(tuned.model).items()}
        config = {"peft_type": "BEFT", "target_modules": list(modules)}
        tensors = {f"{stem}{name}.beft_bias": shift[None] for name, shift in modules.items()}
    save_weights(out / "adapter_model.safetensors", tensors)
    config |= {"task_type": "CAUSAL_LM", "inference_mode": True, "revision": source.revision}
    config |= {"base_model_name_or_path": source.name.partition("@")[0]}
    write_json(out / "adapter_config.json", config)


def write_gguf(tuned: Tuned, out: Path) -> None:
    """Write model.gguf and the licences, by way of a checkpoint that does not stay."""
    gguf.check_gguf(tuned)
    checkpoint = out / "checkpoint"
    checkpoint.mkdir()
    write_hf(tuned, checkpoint)
    gguf.convert(tuned, checkpoint, out / gguf.MODEL)
    for path in (path for pattern in LICENCES for path in checkpoint.glob(pattern)):
        path.rename(out / path.name)
    shutil.rmtree(checkpoint)


WRITERS = {"hf": write_hf, "gguf": write_gguf, "peft": write_peft}


def export(args: argparse.Namespace) -> str:
    """Write DIR, whole or not at all; returns what to print."""
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"--out {args.out}: not an empty folder; name a new one")
    prompts = find_prompts(args.run, args.format) if args.check else []
    tuned, checked = open_tuned(args.run, args.model, args.dtype), ""
    is_lora = tuned.method in LORAS
    if "method" in tuned.info and not (is_lora and args.format == "peft"):
        cure = "take --format peft" if is_lora else "eval.py --offsets reads them"
        raise InputError(f"--format {args.format}: edits of {tuned.method} are no offsets; {cure}")
    if tuned.model.config.stored_in_4_bits and args.format != "peft":
        raise InputError(
            f"--format {args.format}: the base model is stored in 4 bits, which this export would"
            " not keep; take --format peft"
        )
    partial = args.out.absolute().with_name(f".{args.out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        WRITERS[args.format](tuned, partial)
        if args.check:
            checked = check(tuned, prompts, args.format, partial)
        card = model_card(tuned, args.format, args.push_to_hub or args.out.name, checked)
        write(partial / "README.md", card)
        if args.out.exists():
            args.out.rmdir()
        partial.rename(args.out)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{args.out}: cannot be written ({why})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    return f"{args.run} on {tuned.base} -> {args.out} ({args.format}, {size:,} bytes)\n{checked}"


@contextmanager
def hub(repo: str, cure: str) -> Iterator[huggingface_hub.HfApi]:
    """The hub; InputError with this cure for what it refuses."""
    try:
        yield huggingface_hub.HfApi()
    except (HfHubHTTPError, OSError, ValueError) as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"--push-to-hub {repo}: {why}; {cure}") from None


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    repo = args.push_to_hub
    if repo:  # before any work: is it a name, and is a token there?
        with hub(repo, "set HF_TOKEN?") as api:
            huggingface_hub.utils.validate_repo_id(repo)
            api.whoami()
    print(export(args).strip())
    if repo:
        cure = f"{args.out} is complete: upload it with `hf upload {repo} {args.out}`"
        with hub(repo, cure) as api:
            url = api.create_repo(repo, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=args.out)
        print(f"-> {url}")
