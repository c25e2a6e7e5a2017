"""From a folder or a hub id to a model, and back. No weights but safetensors are ever read.

The model is built on torch's meta device (no memory), then every tensor of the checkpoint is
assigned to its place, strictly: a missing or an unknown tensor is an error.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lofit.errors import InputError
from lofit.files import open_tensors
from lofit.llm.config import PLAIN_CURE, ModelConfig
from lofit.llm.hub import commit_of, find_folder, weight_files, what_it_is
from lofit.llm.model import CausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOATS = (torch.float64, *DTYPES.values())
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What a text model has no use for: RoPE tables of old Llama files, the image half of a Gemma 3; and
# A and v in the paper's released checkpoints, which run/released.py reads.
LEFT_OUT = re.compile(
    r".*rotary_emb\.inv_freq$|(model\.)?(vision_tower|multi_modal_projector)\."
    r"|model\.layers\.\d+\.self_attn\.attn_[Av]\.\d+$"
)
# How multimodal Gemma 3 checkpoints (of transformers 4 and 5), and bodies saved alone, say "model."
TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "language_model.": "model.",
    "model.language_model.": "model.",
    **{f"{part}.": f"model.{part}." for part in ("embed_tokens", "layers", "norm")},
}
CHUNK = 512  # words of 8 bytes that are summed for a fingerprint


@dataclass(frozen=True)
class Source:
    """What a model was loaded from. name: as it was given; revision: the commit of a hub id;
    fingerprint: see `fingerprint`; n_parameters: also of weights that are kept in 4 bits."""

    name: str
    revision: str | None
    fingerprint: str
    n_parameters: int


class Whole:
    """How a process keeps the weights: whole, in a dtype, on a device. distributed.py has another
    way (a part of each), and quantize.py (in 4 bits)."""

    def __init__(self, dtype: torch.dtype, device: str):
        self.dtype, self.device = dtype, device

    stored: dict = {}  # weights that come in parts, see `takes`

    def takes(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a stored tensor is a part of a weight, and kept with the other parts of it."""
        return False

    def keep(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What stays of a stored tensor."""
        tensor = tensor.to(self.dtype) if tensor.dtype == torch.float64 else tensor  # not every
        return tensor.to(device=self.device, dtype=self.dtype)  # GPU has float64

    def prepare(self, model: CausalLM, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights that a model on the meta device takes."""
        return kept


def load_model(
    name: str | Path, dtype: torch.dtype | str = torch.float32, device: str = "cpu",
    way: type[Whole] = Whole,
) -> CausalLM:  # fmt: skip
    """Load a frozen model in eval mode; `.source` says where from.

    name: a folder with config.json and safetensors, or a hub id like meta-llama/Llama-2-7b-hf, of a
    revision after an @. dtype: torch's or its name. way: how the weights are kept. InputError for
    anything missing, damaged, unsupported or left over.
    """
    folder, dtype = find_folder(name), DTYPES.get(dtype, dtype)
    if dtype not in FLOATS:
        raise InputError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if not (folder / "config.json").exists() and (kind := what_it_is(folder)):
        raise InputError(kind)
    config = ModelConfig.from_file(folder / "config.json")
    if config.stored_in_4_bits:
        from lofit.quantize import Quantized as way  # noqa: N813
    with torch.device("meta"):
        model = CausalLM(config)
    expected, weights, digests, way = model.state_dict(), {}, {}, way(dtype, device)
    for key, tensor in stored_tensors(folder):
        digests[key] = digest(tensor)
        if not way.takes(key, tensor):
            _check_tensor(folder, key, tensor, expected, weights, dtype)
            weights[key] = way.keep(key, tensor)
    weights = share_ends(weights, config)
    if missing := sorted(expected.keys() - weights.keys() - way.stored.keys()):
        raise InputError(
            f"{folder}: the checkpoint lacks tensors {', '.join(missing[:3])}, {len(missing)} in"
            " all; do config.json and the weights belong together?"
        )
    if config.tie_word_embeddings and not torch.equal(weights[HEAD], weights[EMBEDDING]):
        raise InputError(
            f"{folder}: {HEAD} is not the embedding, but config.json ties them; if it was trained"
            ' apart, write "tie_word_embeddings": false into config.json'
        )
    n_parameters = sum(p.numel() for p in model.parameters())
    model.requires_grad_(False)
    model.load_state_dict(way.prepare(model, weights), strict=True, assign=True)
    model.tie_weights()
    found = fingerprint(share_ends(digests, config), config)
    model.source = Source(str(name), commit_of(folder), found, n_parameters)
    return model.requires_grad_(False).eval()


def stored_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the model, tensor) for each tensor of a checkpoint that a text model needs, read
    when it is yielded."""
    stored = []
    for path in weight_files(folder):
        with open_tensors(path) as file:
            stored += [(path, key) for key in file.keys() if text_name(key)]  # noqa: SIM118
    for path, key in tqdm(stored, "reading", unit="tensor", disable=None, leave=False):
        # opened again for each tensor: what was read of an open file stays in memory
        with open_tensors(path) as file:
            yield text_name(key), file.get_tensor(key)


def text_name(key: str) -> str | None:
    """The name of a stored tensor in a text model; None for what is left out."""
    if LEFT_OUT.match(key):
        return None
    for prefix, ours in TEXT_PREFIXES.items():
        if key.startswith(prefix):
            return ours + key.removeprefix(prefix)
    return key


def share_ends(found: dict, config: ModelConfig) -> dict:
    """Of a tied model files hold the embedding, the head or both: each stands for the other."""
    ends = [found[key] for key in (EMBEDDING, HEAD) if key in found]
    if not config.tie_word_embeddings or not ends:
        return found
    return {EMBEDDING: ends[0], HEAD: ends[-1]} | found


def _check_tensor(folder: Path, key: str, tensor, expected: dict, weights: dict, dtype) -> None:
    """InputError unless a stored tensor has its place in the model and is finite in the dtype."""
    cure = f"If the checkpoint is quantised, {PLAIN_CURE}"
    if tensor.dtype not in FLOATS:
        raise InputError(f"{folder}: tensor {key} is {tensor.dtype}, no plain number. {cure}")
    if key not in expected:
        raise InputError(
            f"{folder}: the checkpoint has an unknown tensor {key}; do config.json and the weights"
            f" belong together? {cure}"
        )
    if key in weights:
        raise InputError(f"{folder}: tensor {key} is stored twice")
    if tensor.shape != expected[key].shape:
        shapes = f"{list(tensor.shape)}, config.json says {list(expected[key].shape)}"
        raise InputError(f"{folder}: tensor {key} is {shapes}")
    if not all(bound.to(dtype).isfinite() for bound in tensor.aminmax()):
        raise InputError(
            f"{folder}: tensor {key} has values that are not finite in {dtype}; take another"
            " --dtype, or fetch it again"
        )


def digest(tensor: torch.Tensor) -> str:
    """Of a tensor's dtype, shape and bytes. The bytes are summed as whole numbers in chunks of 4
    KB, each times an odd number of its own, and the sums are hashed: a value that changes changes
    its sum, and values that change together do not cancel. It is faster than sha256, and no
    signature."""
    data = tensor.contiguous().flatten().view(torch.uint8)
    data = F.pad(data, (0, -len(data) % (8 * CHUNK)))
    sums = data.view(torch.int64).view(-1, CHUNK) @ torch.arange(1, 2 * CHUNK, 2)
    hashed = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    hashed.update(sums.numpy().tobytes())
    return hashed.hexdigest()


def fingerprint(digests: dict[str, str], config: ModelConfig) -> str:
    """16 hex digits that name the base model, wherever its folder lies: over all of its tensors as
    stored, and what config.json makes of them (not which ids begin and end a text). What was
    learned for one base is noise on another."""
    made = asdict(config)
    for field in fields(config):
        # a field that a later version adds, with a default that changes nothing, is not in it
        if field.name in ("bos_token_id", "eos_token_id") or made[field.name] == field.default:
            del made[field.name]
    text = json.dumps([made, digests], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
