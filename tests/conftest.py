"""Shared fixtures: tiny *loud* models, a tiny folder of our own, and the paper's golden data.

Loud: large weights, sequences longer than the trained length, sizes that no default would give.
With ordinary tiny weights a model without RoPE scaling passes a comparison of logits.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

# on a machine that has other work threads wait for one another, at ten times the processor's time
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # tests never touch the network
# a shell's background job, as in CI, ignores Ctrl-C, and so would every script that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
import torch  # noqa: E402

# whether there is a GPU, asked without starting CUDA, which would fix what this process sees
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
SEES_GPU, HAS_GPU = dict(os.environ), torch.cuda.is_available()

from lofit.heads import attach_offsets  # noqa: E402
from lofit.llm.batches import IGNORE, Batch  # noqa: E402
from lofit.llm.checkpoint import load_model  # noqa: E402
from lofit.llm.config import ModelConfig  # noqa: E402
from lofit.llm.model import CausalLM  # noqa: E402
from lofit.llm.save import save_model  # noqa: E402
from lofit.run.files import VERSION, save_edits  # noqa: E402


def pytest_configure(config) -> None:
    """Tests run on the CPU, also where there is a GPU: `auto` would take it, and bf16 with it. A
    test of the GPU starts a process with the environment SEES_GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


REPO = Path(__file__).parent.parent
SHARED = REPO.parent / "shared"
GOLDEN = REPO / "tests" / "golden"
MINI = REPO / "weights" / "mini-llama"
MINI_GEMMA = REPO / "weights" / "mini-gemma"
TOLERANCE = 1e-4

PLAIN_ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
LOUD = dict(
    vocab_size=101, hidden_size=48, intermediate_size=72, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=64,
    rms_norm_eps=1e-2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def slow_but(quick: list, values) -> list:
    """Parameters for pytest, all of them marked slow but the quick ones; a tuple is of several."""
    several = [v if isinstance(v, tuple) else (v,) for v in values]
    marks = [() if v in quick else pytest.mark.slow for v in values]
    return [pytest.param(*v, marks=mark) for v, mark in zip(several, marks, strict=True)]


def _rope(kind: str, **values) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 300.0} | values}


_SHORT = {"factor": 4.0, "original_max_position_embeddings": 16}
LOUD_LLAMAS = {
    "llama2": _rope("default"),
    "gqa": _rope("default") | {"num_key_value_heads": 2},
    "llama3-tied": _rope(
        "llama3", **_SHORT | {"factor": 8.0}, low_freq_factor=1.0, high_freq_factor=4.0
    ) | {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "linear": _rope("linear", factor=4.0),
    "yarn": _rope("yarn", **_SHORT),
    "yarn-all": _rope("yarn", **_SHORT, beta_fast=1.5, beta_slow=0.5, truncate=False, mscale=1.0,
                      mscale_all_dim=0.5),
    "yarn-attention": _rope("yarn", **_SHORT, attention_factor=0.7),
    "biases": _rope("default") | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
}  # fmt: skip


_GEMMA_2 = {"query_pre_attn_scalar": 50, "sliding_window": 10, "head_dim": 16}
LOUD_GEMMAS = {
    "gemma-mha": _rope("default") | {"num_attention_heads": 6, "num_key_value_heads": 6},
    "gemma-mqa": {"num_key_value_heads": 1} | _rope("linear", factor=4.0),
    "gemma-biases": _rope("default") | {"attention_bias": True, "tie_word_embeddings": False},
    "gemma2": _GEMMA_2 | _rope("default") | {
        "num_key_value_heads": 2, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0,
    },
    # 7 layers: the sixth is the first global one
    "gemma3": _GEMMA_2 | {
        "num_hidden_layers": 7, "num_key_value_heads": 2, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 2000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    },
}  # fmt: skip
LOUD_OTHERS = {
    "mistral": _rope("default") | {"num_key_value_heads": 2, "sliding_window": None},
    "mistral-window": _rope("default") | {"num_key_value_heads": 2, "sliding_window": 10},
    "qwen2": _rope("default") | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2-window": _rope("default") | {
        "use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1,
    },
    "qwen3": _rope("default") | {"num_key_value_heads": 2},
}  # fmt: skip
LOUD_MODELS = LOUD_LLAMAS | LOUD_GEMMAS | LOUD_OTHERS
HF_NAMES = dict.fromkeys(LOUD_LLAMAS, "Llama") | {"gemma2": "Gemma2", "gemma3": "Gemma3Text"}
HF_NAMES |= dict.fromkeys(("gemma-mha", "gemma-mqa", "gemma-biases"), "Gemma")
HF_NAMES |= {"mistral": "Mistral", "mistral-window": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
HF_NAMES |= {"qwen2-window": "Qwen2"}


def import_transformers():
    return pytest.importorskip("transformers", reason='needs pip install -e ".[test]"')


@pytest.fixture
def transformers():
    return import_transformers()


def hf_model(name: str):
    """The stock transformers model of a loud configuration, its weights not yet drawn."""
    transformers = import_transformers()
    family = HF_NAMES[name]
    config = getattr(transformers, f"{family}Config")(**LOUD | LOUD_MODELS[name])
    config._attn_implementation = "eager"
    return getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()


@pytest.fixture(scope="session")
def loud(tmp_path_factory):
    """name -> (stock transformers model, its folder as save_pretrained wrote it), fp32, eager."""
    made = {}

    def make(name: str):
        if name not in made:
            torch.manual_seed(0)
            model = hf_model(name)
            norm = 0.0 if name in LOUD_GEMMAS else 1.0  # Gemma adds the one itself
            with torch.no_grad():
                for key, p in model.named_parameters():
                    p.normal_(norm if "norm" in key else 0.0, 0.3)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = (model, folder)
        return made[name]

    return make


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """3 layers x 4 heads (2 key/value heads) x 8; the vocabulary is the miniature's."""
    return ModelConfig(
        vocab_size=891, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=(2,),
    )  # fmt: skip


def random_model(config: ModelConfig, seed: int = 0) -> CausalLM:
    torch.manual_seed(seed)
    model = CausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.2)
    return model


@pytest.fixture(scope="session")
def tiny_once(tmp_path_factory, tiny_config) -> Path:
    folder = tmp_path_factory.mktemp("once") / "tiny"
    save_model(random_model(tiny_config), folder, torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINI / name, folder / name)
    return folder


@pytest.fixture
def tiny_folder(tmp_path, tiny_once) -> Path:
    """A model folder of random weights with the miniature's tokenizer, the test's own."""
    return shutil.copytree(tiny_once, tmp_path / "tiny")


@pytest.fixture
def tiny(tiny_folder) -> CausalLM:
    return load_model(tiny_folder)


@pytest.fixture
def small_data(tmp_path) -> Path:
    """Few items of the miniature: MQuAKE 24, 12, 20; CLUTRR 12, 6, 10; TruthfulQA 10, 4, 8 a fold
    (train, val, test)."""
    mini, folder = REPO / "data" / "mini", tmp_path / "data"
    for task in ("MQuAKE", "clutrr", "truthfulqa"):
        (folder / task).mkdir(parents=True)
    for split, n in (("train", 24), ("val", 12), ("test", 20)):
        with (mini / "MQuAKE" / f"{split}.jsonl").open() as lines:
            (folder / "MQuAKE" / f"{split}.jsonl").write_text("".join(islice(lines, n)))
        stories = json.loads((mini / "clutrr" / f"{split}.json").read_text())[: n // 2]
        (folder / "clutrr" / f"{split}.json").write_text(json.dumps(stories))
    for path in (mini / "truthfulqa").iterdir():
        n = next(n for split, n in (("train", 10), ("val", 4), ("test", 8)) if split in path.name)
        with path.open() as lines:
            (folder / "truthfulqa" / path.name).write_text("".join(islice(lines, n + 1)))
    return folder


@pytest.fixture
def flags(tiny_folder, small_data) -> list[str]:
    """Of a script, for these two."""
    return ["--model", str(tiny_folder), "--data", str(small_data)]


# what torchrun does for scripts, without its own start
GROUP = """
import importlib, json, sys
from lofit import errors
calls = json.loads(sys.argv[1])
errors.run(lambda: [importlib.import_module(name).main(argv) for name, argv in calls])
"""


def start_group(n: int, *calls: tuple[str, list[str]], port=None, ranks=None) -> list:
    """n processes, or those of these ranks, that call `main` of these modules in turn."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    env |= {"TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    env |= {"PYTHONPATH": f"{REPO}:{REPO / 'tests'}:{REPO / 'tests' / 'measure'}"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", GROUP, json.dumps(calls)], cwd=REPO, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (range(n) if ranks is None else ranks)
    ]  # fmt: skip


def end_group(processes: list, timeout: float = 300) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none of them is left."""
    try:
        found = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, found, strict=True)]


@pytest.fixture(scope="session")
def recordings() -> Path:
    """What tests/golden was made of, with the tokenizer and the texts; outside this repository."""
    folder = SHARED / "oracle" / "tiny-llama"
    if not folder.is_dir():
        pytest.skip("needs texts of the data sets, which are not in this repository")
    return folder


def golden_prompts(golden: dict[str, torch.Tensor]) -> list[list[int]]:
    """The recorded prompts of tests/golden/generate.safetensors without their padding."""
    rows = zip(golden["input_ids"], golden["attention_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def make_run(folder, base, scale=1.0, n=5, seed=0):
    """A run folder with random offsets for n heads of a model; returns the model with them."""
    model = load_model(base)
    layers, per_layer = model.config.num_hidden_layers, model.config.num_attention_heads
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(layers * per_layer, generator=generator)[:n].tolist()
    heads = [divmod(i, per_layer) for i in order]
    offsets = torch.randn(n, model.config.head_dim, generator=generator) * scale
    source = model.source
    info = {"version": VERSION, "model": source.name, "revision": None}
    info |= {"fingerprint": source.fingerprint, "task": "mquake"}
    info |= {"data": "data/mini/MQuAKE"}
    info |= {"data_hash": "0", "chat": False, "plain": False, "seed": 7, "heads": heads}
    attach_offsets(model, heads, offsets)
    folder.mkdir(parents=True, exist_ok=True)
    save_edits(folder / "offsets.safetensors", model, info | {"settings": {"lr": 0.5}})
    return model


def run_export(run, form, out, *extra):
    from lofit.export import formats

    formats.main([str(run), "--format", form, "--out", str(out), *extra])
    return out


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference: a mean would hide a wrong position."""
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


def check_batch(batch: Batch, golden: dict[str, torch.Tensor], step: int) -> None:
    """The ids and labels of a batch are the ones recorded from the paper's code."""
    labels = torch.full_like(batch.ids, IGNORE)
    row, column = batch.source
    labels[row, column + 1] = batch.target
    real = golden[f"step{step}.attention_mask"].bool()
    assert torch.equal(labels, golden[f"step{step}.labels"])
    assert torch.equal(batch.ids[real], golden[f"step{step}.input_ids"][real])
