"""From a folder or a hub id to a model, and back. No weights but safetensors are ever read.

The model is built on torch's meta device (no memory), then every tensor of the checkpoint is
assigned to its place, strictly: a missing or an unknown tensor is an error.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from tqdm import tqdm

from lofit.errors import InputError
from lofit.files import write_atomic, write_json
from lofit.llm.config import ModelConfig
from lofit.llm.files import open_tensors, read_json, save_tensors
from lofit.llm.model import CausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HF_METADATA = {"format": "pt"}  # without it transformers refuses a file
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
DOWNLOADS = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "README.md", *LICENCES)
# Names in multimodal Gemma 3 checkpoints as transformers 4 and 5 write them.
VISION = tuple(
    f"{outer}{part}."
    for outer in ("", "model.")
    for part in ("vision_tower", "multi_modal_projector")
)
ROPE_TABLE = "rotary_emb.inv_freq"
TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
HUB_CURES = {  # a gated repository's error is one of a repository not found, so it stands first
    hub_errors.GatedRepoError: "gated; accept its licence on huggingface.co, then set HF_TOKEN",
    hub_errors.RepositoryNotFoundError: (
        "no such folder here, and no such repository on the hub; check the name, or set HF_TOKEN if"
        " it is private"
    ),
    hub_errors.RevisionNotFoundError: "the repository has no such revision; check --revision",
}
TO_CONVERT = (
    "pickled weights are never loaded; convert them once where you trust the file, e.g. with"
    " transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
)


@dataclass(frozen=True)
class Source:
    """Where a model came from; every artefact of a run carries it.

    fingerprint: 16 hex digits over config.json and names, shapes and sampled values of all tensors
    as stored.
    """

    name: str
    revision: str | None
    fingerprint: str


def load_model(
    name: str | Path,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> CausalLM:
    """Load a frozen model in eval mode; `.source` says where from.

    name: a folder with config.json and safetensors, or a hub id such as meta-llama/Llama-2-7b-hf.
    Raises InputError for anything missing, damaged, unsupported or left over.
    """
    folder = find_folder(name, revision)
    config = ModelConfig.from_file(folder / "config.json")
    return assemble(str(name), revision, folder, config, text_name, dtype, device)


def assemble(
    name: str,
    revision: str | None,
    folder: Path,
    config: ModelConfig,
    name_of: Callable[[str], str | None],
    dtype: torch.dtype,
    device: str,
    shards=None,
) -> CausalLM:
    """The model that `config` describes, with a folder's weights. name_of: a stored tensor's name
    in the model, None to leave it out; shards: a distributed.sharded.Shards, to read and keep this
    process's part alone.
    InputError unless each tensor has its place."""
    files, rows = weight_files(folder), shards.rows if shards else None
    weights: dict[str, torch.Tensor] = {}
    samples: dict[str, list[float]] = {}
    shapes = {name_of(key): shape for key, shape in stored_shapes(files, name_of)}
    for key, tensor in stored_tensors(files, name_of, rows):
        check_values(tensor, f"{folder}: tensor {key}")
        samples[name_of(key)] = sample(tensor, shapes[name_of(key)], rows)
        weights[name_of(key)] = tensor.to(device=device, dtype=dtype)
    samples = shards.merge(samples) if shards else samples
    digests = {name: digest(shapes[name], values) for name, values in samples.items()}
    if config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        embedding = weights["model.embed_tokens.weight"]
        if not torch.equal(weights.get("lm_head.weight", embedding), embedding):
            raise InputError(
                f"{folder}: lm_head.weight is not the embedding, but config.json ties them"
                " (tie_word_embeddings); do both files belong together?"
            )
        weights["lm_head.weight"] = embedding
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = CausalLM(config)
    check_tensors(shapes, model, folder)
    model.requires_grad_(False)
    if shards:
        weights = shards.split(model, weights)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    if shards:
        shards.begin(model)
    commit = folder.name if folder.parent.name == "snapshots" else revision
    model.source = Source(name, commit, fingerprint(digests, config))
    return model.requires_grad_(False).eval()


def stored_shapes(
    paths: list[Path], wanted: Callable[[str], object]
) -> Iterator[tuple[str, torch.Size]]:
    """(name, shape) of all tensors in checkpoint files whose name is wanted."""
    for path in paths:
        with open_tensors(path) as file:
            for key in filter(wanted, file.keys()):
                yield key, torch.Size(file.get_slice(key).get_shape())


def stored_tensors(
    paths: list[Path],
    wanted: Callable[[str], object],
    rows: Callable[[int], slice] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all in checkpoint files whose name is wanted, read when its turn comes; of
    its n rows, rows(n)."""
    stored = []
    for path in paths:
        with open_tensors(path) as file:
            stored += [(path, key) for key in file.keys() if wanted(key)]  # noqa: SIM118
    for path, key in tqdm(stored, desc="reading", unit="tensor", disable=None, leave=False):
        # opened anew each time: while a file is open, all that was read of it stays in memory
        with open_tensors(path) as file:
            if rows is None:
                tensor = file.get_tensor(key)
            else:
                part = file.get_slice(key)
                tensor = part[rows(part.get_shape()[0])]
        yield key, tensor


def find_folder(
    name: str | Path, revision: str | None = None, wanted: tuple[str, ...] = DOWNLOADS
) -> Path:
    """A folder as it is; anything else is a hub id, whose wanted files go into the HF cache."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise InputError(f"{name}: no such folder (nor a hub id like owner/name)")
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(wanted)))
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError, ValueError) as error:
        cures = (cure for kind, cure in HUB_CURES.items() if isinstance(error, kind))
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        cure = next(cures, f"neither a folder here nor to be fetched from the hub ({reason})")
        raise InputError(f"{name}: {cure}") from None


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files: one, or the shards that the index names."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{folder / INDEX}: no weight_map; expected tensor name -> shard file")
        shards = sorted({str(shard) for shard in weight_map.values()})
        for shard in shards:
            if os.path.basename(shard) != shard or shard in ("", ".", ".."):
                raise InputError(f"{folder / INDEX}: shard path {shard!r} leaves the folder")
            if not (folder / shard).is_file():
                raise InputError(f"{folder / shard}: shard is missing; fetch the checkpoint again")
        return [folder / shard for shard in shards]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickled:
        raise InputError(f"{folder / pickled[0]}: {TO_CONVERT}")
    raise InputError(f"{folder}: no {SINGLE} and no {INDEX} in it")


def text_name(key: str) -> str | None:
    """The name of a stored tensor in a text model; None for what a text model has no use for: the
    RoPE tables of old Llama files, the image half of a multimodal Gemma 3."""
    if key.endswith(ROPE_TABLE) or key.startswith(VISION):
        return None
    for prefix, ours in TEXT_PREFIXES.items():
        if key.startswith(prefix):
            return ours + key.removeprefix(prefix)
    return key


def check_values(tensor: torch.Tensor, what: str) -> None:
    """InputError unless a tensor holds floating-point numbers, all of them finite."""
    if tensor.dtype not in (*DTYPES.values(), torch.float64):
        raise InputError(f"{what} is {tensor.dtype}; expected float32, bfloat16 or float16")
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        raise InputError(f"{what} has values that are not finite; fetch the checkpoint again")


def sample(
    tensor: torch.Tensor, shape: torch.Size, rows: Callable[[int], slice] | None = None
) -> list[float]:
    """Up to 64 values, evenly spread, of a tensor of that shape; those among the rows that are
    here."""
    n, step = shape.numel(), max(1, shape.numel() // 64)
    first = 0 if rows is None else rows(shape[0]).start * (n // shape[0])
    number = -(-first // step)  # of the first one here
    part = tensor.flatten()[number * step - first :: step][: max(0, 64 - number)]
    return part.to("cpu", torch.float64).tolist()


def digest(shape: torch.Size, values: list[float]) -> bytes:
    """Hash of a tensor's shape and of its `sample`."""
    return hashlib.sha256(f"{tuple(shape)} {values}".encode()).digest()


def fingerprint(digests: dict[str, bytes], config: ModelConfig) -> str:
    """16 hex digits over the `digest` of each tensor by its `text_name`, and over what config.json
    makes of them (rope_theta, caps, ...; not which ids begin and end a text)."""
    hashed = hashlib.sha256(b"".join(key.encode() + digests[key] for key in sorted(digests)))
    made = asdict(config)
    for key in ("vocab_size", "bos_token_id", "eos_token_id"):  # the first is in the shapes
        del made[key]
    hashed.update(json.dumps(made, sort_keys=True).encode())
    return hashed.hexdigest()[:16]


def check_tensors(shapes: dict[str, torch.Size], model: CausalLM, folder: Path) -> None:
    """Raise InputError unless a checkpoint has just the tensors that the model needs."""
    expected = model.state_dict()
    for what, names in (
        ("lacks", sorted(expected.keys() - shapes.keys())),
        ("has unknown", sorted(shapes.keys() - expected.keys())),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(
                f"{folder}: the checkpoint {what} tensors {', '.join(names[:3])}{more};"
                " do config.json and the weights belong together?"
            )
    for key, shape in shapes.items():
        if shape != expected[key].shape:
            raise InputError(
                f"{folder}: tensor {key} is {list(shape)}, config.json says"
                f" {list(expected[key].shape)}"
            )


def save_model(model: CausalLM, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors in HF's format (tied weights once)."""
    weights = {k: v.to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    write_atomic(folder / SINGLE, lambda path: save_tensors(path, weights, HF_METADATA))
    name = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", model.config.to_hf() | {"dtype": name, "torch_dtype": name})
