"""Finding a checkpoint's folder, here or on the Hugging Face hub, and the weight files in it."""

import os
from pathlib import Path

from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download

from lofit.errors import InputError
from lofit.files import read_json, reading

SHIPPED = ("weights", "data")  # folders of this repository, found from any working directory
ROOTS = (Path(__file__).parents[2], Path(__file__).parents[1] / "shipped")  # the latter: installed
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
DOWNLOADS = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "README.md", *LICENCES)
HUB_CURES = {  # a gated repository's error is one of a repository not found, so it stands first
    hub_errors.GatedRepoError: "gated; accept its licence on huggingface.co, then set HF_TOKEN",
    hub_errors.RepositoryNotFoundError: "no such folder here, and no such repository on the hub;"
    " check the name, or set HF_TOKEN if it is private",
    hub_errors.RevisionNotFoundError: "the repository has no such revision; check what follows the"
    " @",
}
# Files that a folder holds instead of a checkpoint to load -> what it is and what to do
OTHER_KINDS = {
    "adapter_config.json": "a peft adapter, no model: name its base model, or merge the two with"
    " peft (merge_and_unload, then save_pretrained)",
    "consolidated.*": "weights in Meta's own format; take the repository whose name ends in -hf, or"
    " convert them with transformers' convert_llama_weights_to_hf.py",
    "*.gguf": "a GGUF file for llama.cpp; take the safetensors checkpoint that it was made from, or"
    " save it as one with transformers: from_pretrained(DIR, gguf_file=NAME)",
    **dict.fromkeys(
        ("*.bin", "*.pt", "*.pth"),
        "pickled weights, which can run code, are never loaded; convert them once where you trust"
        " the file: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
    ),
}


def local_folder(name: str | Path) -> Path | None:
    """A folder here; or one of SHIPPED, from any working directory. None if there is none."""
    path = Path(name)
    shipped = [root / path for root in ROOTS] if path.parts[:1] and path.parts[0] in SHIPPED else []
    try:
        return next((folder for folder in [path, *shipped] if folder.is_dir()), None)
    except (OSError, ValueError):  # too long a name, or one with a null character
        return None


def find_folder(name: str | Path, wanted: tuple[str, ...] = DOWNLOADS) -> Path:
    """A folder as `local_folder` finds it; else owner/name or owner/name@revision on the hub, whose
    wanted files go into the HF cache."""
    folder = local_folder(name)
    if folder is not None:
        return folder
    repository, _, revision = str(name).partition("@")
    owner = repository.split("/")[0]
    if repository.count("/") != 1 or owner[:1] in ("", ".", "~") or owner in (*SHIPPED, "runs"):
        raise InputError(f"{name}: no such folder (nor a hub id like owner/name)")
    try:
        found = snapshot_download(repository, revision=revision or None, allow_patterns=[*wanted])
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        cures = (cure for kind, cure in HUB_CURES.items() if isinstance(error, kind))
        cure = next(cures, f"neither a folder here nor to be fetched from the hub ({reason})")
        raise InputError(f"{name}: {cure}") from None
    return Path(found)


def commit_of(folder: Path) -> str | None:
    """The commit of a hub's repository whose folder lies in the HF cache."""
    return folder.name if folder.parent.name == "snapshots" else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files: one, or the shards that an index names. As in transformers,
    model.safetensors goes before an index."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.exists():
        raise InputError(what_it_is(folder) or f"{folder}: no {SINGLE} and no {INDEX} in it")
    with reading(index):
        # names alone: whatever an index says, nothing outside its folder is read
        names = sorted({Path(name).name for name in read_json(index)["weight_map"].values()})
    for name in names:
        if not os.path.isfile(folder / name):  # False also for a name that no file can have
            raise InputError(f"{folder / name}: shard is missing; fetch the checkpoint again")
    return [folder / name for name in names]


def what_it_is(folder: Path) -> str | None:
    """Names a folder without a checkpoint to load for what it is; None if we do not know."""
    for pattern, kind in OTHER_KINDS.items():
        for path in sorted(folder.glob(pattern)):
            return f"{path}: {kind}"
    return None
