"""Finding a checkpoint's folder, here or on the hub, and the weight files in it."""

import os
from pathlib import Path

from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download

from lofit.errors import InputError
from lofit.llm.files import is_file, read_json, what_it_is

REPOSITORY = Path(__file__).parents[2]
SHIPPED = ("weights", "data")  # folders of the repository, found from any working directory
OWN_FOLDERS = (*SHIPPED, "runs")  # never an owner on the hub
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
DOWNLOADS = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "README.md", *LICENCES)
HUB_CURES = {  # a gated repository's error is one of a repository not found, so it stands first
    hub_errors.GatedRepoError: "gated; accept its licence on huggingface.co, then set HF_TOKEN",
    hub_errors.RepositoryNotFoundError: (
        "no such folder here, and no such repository on the hub; check the name, or set HF_TOKEN if"
        " it is private"
    ),
    hub_errors.RevisionNotFoundError: "the repository has no such revision; check --revision",
}


def local_folder(name: str | Path) -> Path | None:
    """The folder of that name: in the working directory, else, if its path begins with one of
    SHIPPED, in the repository. None if there is none."""
    path = Path(name)
    found = [path, REPOSITORY / path] if path.parts[:1] and path.parts[0] in SHIPPED else [path]
    try:
        return next((folder for folder in found if folder.is_dir()), None)
    except (OSError, ValueError):  # too long a name, or one with a null character
        return None


def find_folder(
    name: str | Path, revision: str | None = None, wanted: tuple[str, ...] = DOWNLOADS
) -> Path:
    """A folder as `local_folder` finds it; anything else is a hub id, whose wanted files go into
    the HF cache."""
    folder = local_folder(name)
    if folder is not None:
        return folder
    owner = str(name).split("/")[0]
    if str(name).count("/") != 1 or owner[:1] in ("", ".", "~") or owner in OWN_FOLDERS:
        raise InputError(f"{name}: no such folder (nor a hub id like owner/name)")
    if is_file(Path(name)):
        raise InputError(f"{name}: a file; expected a folder (or a hub id like owner/name)")
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(wanted)))
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError, ValueError) as error:
        cures = (cure for kind, cure in HUB_CURES.items() if isinstance(error, kind))
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        cure = next(cures, f"neither a folder here nor to be fetched from the hub ({reason})")
        raise InputError(f"{name}: {cure}") from None


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files: one, or the shards that the index names. As in
    transformers, model.safetensors goes before an index."""
    if is_file(folder / SINGLE):
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        raise InputError(what_it_is(folder) or f"{folder}: no {SINGLE} and no {INDEX} in it")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX}: no weight_map; expected tensor name -> shard file")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if os.path.basename(shard) != shard or shard in ("", ".", ".."):
            raise InputError(f"{folder / INDEX}: shard path {shard!r} leaves the folder")
        if not is_file(folder / shard):
            raise InputError(f"{folder / shard}: shard is missing; fetch the checkpoint again")
    return [folder / shard for shard in shards]
