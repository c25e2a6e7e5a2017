"""The model card of an export: what it is, from which base, how well it does, how to use it."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from lofit.export.folding import FoldedBase
from lofit.run.adapters import Adapter
from lofit.run.summary import results_table

LIBRARY = {
    "hf": "transformers", "gguf": "gguf", "peft": "peft", "steered": "lm-eval", "lofit": "lofit",
}  # fmt: skip
WHOLE = ("hf", "gguf")  # the others are adapters
LICENCE_KEYS = ("license", "license_name", "license_link")
USE = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
```

The offsets are biases of `o_proj`; the other biases that `attention_bias` creates are zero.
""",
    "gguf": """```
llama-server -m DIR/model.gguf
```

Ollama (not tried), with this as its `Modelfile`:

```
FROM ./model.ggufTEMPLATE
PARAMETER temperature 0
```
""",
    "peft": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("BASE")
model = PeftModel.from_pretrained(base, "DIR")  # peft >= 0.21.2
```

`merge_and_unload` fails in peft, for the base has no bias to add the adapter to: a model in one
piece is what `python -m lofit.export RUN --format hf` writes. Several adapters in one model:
`model.load_adapter(OTHER, "other")`, then `model.set_adapter("other")`.
""",
    "steered": """```
lm_eval --model steered --model_args pretrained=BASE,steer_path=DIR/steering.pt --tasks ...
```
""",
    "lofit": """```
python eval.py --model BASE --offsets DIR
```
""",
}
# Where a family's exports were seen to answer as they should: tests/measure/serving.py, --check,
# docs/export.md. What is in neither table was not tried.
_STOCK = "transformers 5.24.0"
SEEN = {
    "hf": {
        "llama": f"{_STOCK}, vLLM 0.32.0 (CPU)",
        "gemma": f"{_STOCK}, vLLM 0.32.0 (CPU) with `--model-impl transformers`",
        "gemma2": f"{_STOCK}, vLLM 0.32.0 (CPU)",
        "gemma3_text": f"{_STOCK}, vLLM 0.32.0 (CPU)",
    },
    "gguf": {"llama": "llama.cpp's server (package xllamacpp 2026.10.11549)"},
    "peft": dict.fromkeys(("llama", "gemma", "gemma2", "gemma3_text"), f"peft 0.21.2, {_STOCK}"),
    "steered": {"llama": "lm-eval 0.4.13"},
    "lofit": {},
}
# Who serves the base model instead, without a word.
DROPS = {
    ("hf", "gemma"): "vLLM's own Gemma 1 (0.32.0): it leaves biases of attention out",
}


def model_card(
    base: FoldedBase, adapter: Adapter, form: str, name: str, checked: str | None = None
) -> str:
    """README.md of an export in one of the formats of export.py; name: its hub id or folder;
    checked: what --check found."""
    info, licence = adapter.info, licence_of(base.folder)
    hub_id = base.name if _is_id(base.name) else None  # the hub refuses other names
    data = huggingface_hub.ModelCardData(
        base_model=hub_id,
        library_name=LIBRARY[form],
        pipeline_tag="text-generation",
        tags=["lofit", *([f"base_model:adapter:{hub_id}"] if hub_id and form not in WHOLE else [])],
        **licence,
    )
    n = adapter.offsets.numel()
    facts = {
        "base model": f"{base.name}{f' at {base.revision}' if base.revision else ''}",
        "fingerprint of its weights": base.fingerprint,
        "method": "LoFiT, offset vectors on the outputs of chosen attention heads"
        " (https://arxiv.org/abs/2406.01563)",
        "task": _task(info),
        "heads (layer, head)": f"{len(adapter.heads)}: "
        + " ".join(f"({layer}, {head})" for layer, head in adapter.heads),
        "trained values": f"{n:,}",
        "seed": info.get("seed", "not recorded"),
        "settings": ", ".join(f"{k} {v}" for k, v in info.get("settings", {}).items())
        or "not recorded",
        "licence": licence.get(
            "license", f"not stated in the base model's folder; see {base.name}"
        ),
    }
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    use = USE[form].replace("BASE", base.name).replace("DIR", name)
    use = use.replace("TEMPLATE", "" if info.get("chat") else '\nTEMPLATE """{{ .Prompt }}"""')
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {base.name} with LoFiT offsets\n\n| | |\n|---|---|\n"
        f"{rows}\n## Scores\n\n{_scores(adapter)}\n## Use\n\n{use}"
        f"{_programs(form, base.config.model_type, checked)}"
    )


def _task(info: dict) -> str:
    parts = [str(info.get("task", "not recorded"))]
    if info.get("fold") is not None:
        parts.append(f"fold {info['fold']}")
    if info.get("chat"):
        parts.append("asked in the chat template")
    return ", ".join(parts)


def _programs(form: str, family: str, checked: str | None) -> str:
    seen, drops = SEEN[form].get(family), DROPS.get((form, family))
    lines = [
        seen and f"Exports of this family were seen to answer as they should in {seen}.",
        drops and f"**Not with {drops}, and so would serve the base model.**",
        checked and f"{checked[0].upper()}{checked[1:]} (20 greedy answers of 16 tokens).",
    ]
    return "".join(f"\n{line}\n" for line in lines if line)


def _scores(adapter: Adapter) -> str:
    results = adapter.results()
    if results is None:
        return "Not evaluated: no results.json of these offsets beside them.\n"
    return (
        f"{results['task']}, {results['split']} split, {results['n']} items:\n\n"
        f"```\n{results_table(results)}\n```\n"
    )


def licence_of(folder: Path) -> dict[str, str]:
    """What the front matter of a model folder's README.md says of its licence."""
    path = folder / "README.md"
    if not path.exists():
        return {}
    try:
        data = huggingface_hub.ModelCard.load(path).data.to_dict()
    except (ValueError, OSError):
        return {}
    return {key: str(data[key]) for key in LICENCE_KEYS if data.get(key)}


def _is_id(name: str) -> bool:
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name
