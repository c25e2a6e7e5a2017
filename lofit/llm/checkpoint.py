"""From a folder or a hub id to a model, and back. No weights but safetensors are ever read.

The model is built on torch's meta device (no memory), then every tensor of the checkpoint is
assigned to its place, strictly: a missing or an unknown tensor is an error.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from lofit.errors import InputError
from lofit.llm.config import PLAIN_CURE, ModelConfig
from lofit.llm.files import open_tensors, save_tensors
from lofit.llm.folder import SINGLE, find_folder, weight_files
from lofit.llm.model import CausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HF_METADATA = {"format": "pt"}  # without it transformers refuses a file
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
    "language_model.": "model.",
    "model.language_model.": "model.",
    # a body that was saved alone
    **{f"{part}.": f"model.{part}." for part in ("embed_tokens", "layers", "norm")},
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = ("F64", "F32", "BF16", "F16")  # as safetensors names them
# In the names of what quantised checkpoints store beside a weight or instead of it
PACKED = re.compile("qweight|qzeros|g_idx|scale|zero_point|packed|SCB|absmax|quant|codebook")


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
    """Build the model that `config` describes, with a folder's weights.

    name_of: maps a stored tensor's name to its name in the model, or to None to leave it out.
    shards: a distributed.sharded.Shards; this process then reads and keeps its own part only.
    InputError unless each tensor has its place and is finite."""
    files, rows = weight_files(folder), shards.rows if shards else None
    weights: dict[str, torch.Tensor] = {}
    samples: dict[str, list[float]] = {}
    with torch.device("meta"):
        model = CausalLM(config)
    stored = checked_shapes(files, name_of, folder)
    shapes = share_ends(stored, config)
    check_tensors(shapes, model, folder)
    for key, tensor in stored_tensors(files, name_of, rows):
        check_values(tensor, f"{folder}: tensor {key}", dtype)
        samples[name_of(key)] = sample(tensor, stored[name_of(key)], rows)
        tensor = tensor.to(dtype) if tensor.dtype == torch.float64 else tensor  # not every GPU's
        weights[name_of(key)] = tensor.to(device=device, dtype=dtype)
    samples = shards.merge(samples) if shards else samples
    digests = {name: hash_of_tensor(stored[name], values) for name, values in samples.items()}
    weights = share_ends(weights, config)
    if config.tie_word_embeddings and not torch.equal(weights[HEAD], weights[EMBEDDING]):
        raise InputError(
            f"{folder}: {HEAD} is not the embedding, but config.json ties them; if it was trained"
            ' apart, write "tie_word_embeddings": false into config.json'
        )
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


def checked_shapes(
    paths: list[Path], name_of: Callable[[str], str | None], folder: Path
) -> dict[str, torch.Size]:
    """The shapes of all tensors in checkpoint files that have a name in the model, by that name.
    InputError for a tensor that is stored twice or holds no plain floating-point numbers."""
    shapes: dict[str, torch.Size] = {}
    for path in paths:
        with open_tensors(path) as file:
            for key in filter(name_of, file.keys()):
                part, name = file.get_slice(key), name_of(key)
                if part.get_dtype() not in FLOATS:
                    raise InputError(
                        f"{folder}: tensor {key} is {part.get_dtype()}; expected float32, bfloat16"
                        f" or float16. If the checkpoint is quantised, {PLAIN_CURE}"
                    )
                if name in shapes:
                    raise InputError(f"{folder}: tensor {name} is stored twice, as {key} too")
                shapes[name] = torch.Size(part.get_shape())
    return shapes


def share_ends(found: dict, config: ModelConfig) -> dict:
    """Of a tied model files hold the embedding, the head or both: each stands for the other."""
    ends = [found[key] for key in (EMBEDDING, HEAD) if key in found]
    if not config.tie_word_embeddings or not ends:
        return found
    return {EMBEDDING: ends[0], HEAD: ends[-1]} | found


def stored_tensors(
    paths: list[Path],
    wanted: Callable[[str], object],
    rows: Callable[[int], slice] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) for each tensor whose name is wanted; each is read when it is yielded.
    rows: maps a tensor's number of rows to the slice of rows to read."""
    stored = []
    for path in paths:
        with open_tensors(path) as file:
            stored += [(path, key) for key in file.keys() if wanted(key)]  # noqa: SIM118
    for path, key in tqdm(stored, desc="reading", unit="tensor", disable=None, leave=False):
        # opened again for each tensor: what was read of an open file stays in memory
        with open_tensors(path) as file:
            if rows is None:
                tensor = file.get_tensor(key)
            else:
                part = file.get_slice(key)
                tensor = part[rows(part.get_shape()[0])]
        yield key, tensor


def text_name(key: str) -> str | None:
    """The name of a stored tensor in a text model; None for what a text model has no use for: the
    RoPE tables of old Llama files, the image half of a multimodal Gemma 3."""
    if key.endswith(ROPE_TABLE) or key.startswith(VISION):
        return None
    for prefix, ours in TEXT_PREFIXES.items():
        if key.startswith(prefix):
            return ours + key.removeprefix(prefix)
    return key


def check_values(tensor: torch.Tensor, what: str, dtype: torch.dtype) -> None:
    """InputError unless all numbers of a tensor are finite, as stored and in a dtype."""
    bounds = tensor.aminmax() if tensor.numel() else ()
    if not all(bound.isfinite() for bound in bounds):
        raise InputError(f"{what} has values that are not finite; fetch the checkpoint again")
    if not all(bound.to(dtype).isfinite() for bound in bounds):
        name, largest = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        cure = "take --dtype bfloat16" if largest < 1e5 else "no dtype here holds them"
        raise InputError(f"{what} has values above {largest:.3g}, too large for {name}; {cure}")


def sample(
    tensor: torch.Tensor, shape: torch.Size, rows: Callable[[int], slice] | None = None
) -> list[float]:
    """Up to 64 evenly spread values of a tensor of that shape; with `rows`, those in the rows that
    this process has."""
    n, step = shape.numel(), max(1, shape.numel() // 64)
    first = 0 if rows is None else rows(shape[0]).start * (n // shape[0])
    number = -(-first // step)  # of the first one here
    part = tensor.flatten()[number * step - first :: step][: max(0, 64 - number)]
    return part.to("cpu", torch.float64).tolist()


def hash_of_tensor(shape: torch.Size, values: list[float]) -> bytes:
    """Hash of a tensor's shape and of its `sample`."""
    return hashlib.sha256(f"{tuple(shape)} {values}".encode()).digest()


def fingerprint(digests: dict[str, bytes], config: ModelConfig) -> str:
    """16 hex digits over the `hash_of_tensor` of each tensor by its `text_name`, and over what
    config.json makes of them (rope_theta, caps, ...; not which ids begin and end a text)."""
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
            cure = "do config.json and the weights belong together?"
            if any(map(PACKED.search, shapes.keys() - expected.keys())):
                cure = f"it looks quantised; {PLAIN_CURE}"
            raise InputError(
                f"{folder}: the checkpoint {what} tensors {', '.join(names[:3])}{more}; {cure}"
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
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / SINGLE, weights, HF_METADATA)
    name = str(dtype).removeprefix("torch.")
    config = model.config.to_hf() | {"dtype": name, "torch_dtype": name}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
