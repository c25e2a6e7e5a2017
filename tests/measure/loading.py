"""Peak memory of loading a sharded checkpoint, as a share of its weights.

python tests/measure/loading.py                # 2 GB of random bf16 weights in 5 shards
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from lofit.llm.folder import INDEX
from safetensors.torch import save_file

from lofit.files import write_json
from lofit.llm.checkpoint import load_model
from lofit.llm.config import ModelConfig
from lofit.llm.model import CausalLM

CONFIG = ModelConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=1,
    num_attention_heads=16, num_key_value_heads=16, head_dim=128, max_position_embeddings=2048,
    rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=(2,),
)  # fmt: skip


def write_checkpoint(folder: Path, gigabytes: float, shards: int) -> int:
    """Random bf16 weights of about that size; returns the number of values."""

    def shapes(layers: int) -> dict[str, torch.Size]:
        with torch.device("meta"):
            model = CausalLM(replace(CONFIG, num_hidden_layers=layers))
        return {key: tensor.shape for key, tensor in model.state_dict().items()}

    def count(layers: int) -> int:
        return sum(shape.numel() for shape in shapes(layers).values())

    layers = max(1, round((gigabytes * 1e9 / 2 - count(0)) / (count(1) - count(0))))
    keys = list(shapes(layers).items())
    per_shard, weight_map = -(-len(keys) // shards), {}
    for i in range(shards):
        part = dict(keys[i * per_shard : (i + 1) * per_shard])
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({k: torch.randn(s).bfloat16() for k, s in part.items()}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    write_json(folder / "config.json", replace(CONFIG, num_hidden_layers=layers).to_hf())
    return count(layers)


def memory(kind: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if kind in line) * 1024


def measure(folder: Path, dtype: torch.dtype, results: multiprocessing.Queue) -> None:
    """Load in a process of its own, whose peak is then the loader's."""
    before, start = memory("VmRSS"), time.time()
    model = load_model(folder, dtype=dtype)
    seconds, at_peak = time.time() - start, memory("VmHWM")
    assert all(p.dtype == dtype for p in model.parameters())
    results.put((at_peak - before, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=5)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        n_values = write_checkpoint(Path(name), args.gigabytes, args.shards)
        print(f"{n_values:,} values stored in bfloat16, {args.shards} shards")
        for dtype in (torch.bfloat16, torch.float32):
            results = context.Queue()
            process = context.Process(target=measure, args=(Path(name), dtype, results))
            process.start()
            peak, seconds = results.get()
            process.join()
            size = n_values * dtype.itemsize
            print(
                f"as {dtype}: weights {size / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB"
                f" = {peak / size:.3f} x the weights, {seconds:.1f} s"
            )


if __name__ == "__main__":
    main()
