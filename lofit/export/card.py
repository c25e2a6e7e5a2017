"""The model card of an export: what it is, from which base, how well it does, how to use it."""

import shlex
from pathlib import Path

import huggingface_hub
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError

from lofit.heads import attached_offsets
from lofit.llm.hub import find_folder
from lofit.run.files import read_results
from lofit.run.summary import results_table
from lofit.run.tuned import Tuned

LIBRARY = {"hf": "transformers", "gguf": "gguf", "peft": "peft"}
LICENCE_KEYS = ("license", "license_name", "license_link")
TEMPLATE = """---
{{ card_data }}
---

# {{ base }} with {{ method }}

| | |
|---|---|
{% for key, value in facts.items() %}
| {{ key }} | {{ value }} |
{% endfor %}

## Scores

{{ scores }}

## Use

{{ use }}
"""
USE = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
```

The offsets are biases of `o_proj`; the other biases that `attention_bias` creates are zero, or the
base model's own.""",
    "gguf": """```
llama-server -m DIR/model.gguf
```

Ollama (not tried), with this as its `Modelfile`:

```
FROM ./model.ggufTEMPLATE
PARAMETER temperature 0
```""",
    "peft": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("BASE")
model = PeftModel.from_pretrained(base, "DIR")  # peft >= 0.21.2
```

Several adapters in one model: `model.load_adapter(OTHER, "other")`, `model.set_adapter("other")`.
Of offsets `merge_and_unload` fails, for the base has no bias to add to: a model in one piece is
what `python -m lofit.export RUN --format hf` writes.""",
}
# Where exports of a class were seen to answer as the tuned model: tests/measure/serving.py, the
# tests, docs/export.md. What is not in the table was not tried.
SEEN = {
    "llama": "vLLM 0.32.0 (CPU)",
    "gemma": "vLLM 0.32.0 (CPU) with `--model-impl transformers`. **vLLM's own Gemma 1 leaves"
    " biases of attention out and would serve the base model, without a word**",
    "gemma2": "vLLM 0.32.0 (CPU)",
    "gemma3_text": "vLLM 0.32.0 (CPU)",
}


def model_card(tuned: Tuned, form: str, name: str, checked: str = "") -> str:
    """README.md of an export. name: its hub id or folder; checked: what --check found."""
    info, source = tuned.info, tuned.model.source
    base, licence = source.name.partition("@")[0], licence_of(find_folder(tuned.base))
    hub_id = base if _is_id(base) else None  # the hub refuses other names
    adapter = hub_id and form == "peft"
    data = ModelCardData(
        base_model=hub_id,
        library_name=LIBRARY[form],
        pipeline_tag="text-generation",
        tags=["lofit", *([f"base_model:adapter:{hub_id}"] if adapter else [])],
        **licence,
    )
    heads, offsets = attached_offsets(tuned.model)
    facts = {
        "base model": f"{base}{f' at {source.revision}' if source.revision else ''}",
        "fingerprint of its weights": source.fingerprint,
        "method": f"{tuned.method}, of [LoFiT](https://arxiv.org/abs/2406.01563)'s code",
        "task": f"{info.get('task', 'not recorded')}"
        f"{', asked in the chat template' if info.get('chat') else ''}",
        "heads (layer, head)": f"{len(heads)}: {' '.join(f'({i}, {h})' for i, h in heads)}",
        "trained values": f"{info.get('trained_values', offsets.numel()):,}",
        "seed": info.get("seed", "not recorded"),
        "settings": ", ".join(f"{k} {v}" for k, v in info["settings"].items()) or "not recorded",
        "licence": licence.get("license", f"not stated in the base model's folder; see {base}"),
    }
    if not heads:
        del facts["heads (layer, head)"]
    use = USE[form].replace("BASE", base).replace("DIR", name)
    use = use.replace("TEMPLATE", "" if info.get("chat") else '\nTEMPLATE """{{ .Prompt }}"""')
    if info.get("chat"):
        use += "\n\nAsk in the chat template (`tokenizer.apply_chat_template`), as it was trained."
    seen = SEEN.get(tuned.model.config.model_type) if form == "hf" else None
    use += f"\n\nSeen to answer as the tuned model in {seen}." if seen else ""
    use += f"\n\n{checked[0].upper()}{checked[1:]} (greedy, 16 tokens)." if checked else ""
    return str(
        ModelCard.from_template(
            data, template_str=TEMPLATE, base=base, facts=facts, scores=_scores(tuned), use=use,
            method="LoFiT offsets" if heads else tuned.method,
        )
    )  # fmt: skip


def _scores(tuned: Tuned) -> str:
    info, command = tuned.info, ["python", "eval.py", "--model", tuned.base]
    command += ["--task", str(info.get("task", "TASK"))]
    dtype = info["settings"].get("dtype")
    command += ["--chat"] * bool(info.get("chat")) + ["--plain"] * bool(info.get("plain"))
    command += ["--dtype", dtype] if dtype else []
    text = f"```\n{shlex.join([*command, '--offsets', str(tuned.path.parent)])}\n```"
    results = read_results(tuned.path.parent)
    if results is None:
        return f"Not evaluated: no results.json of these offsets beside them. To do so:\n\n{text}"
    head = f"{results['task']}, {results['split']} split, {results['n']} items:"
    return f"{head}\n\n```\n{results_table(results)}\n```\n\nMade by\n\n{text}"


def licence_of(folder: Path) -> dict[str, str]:
    """What the front matter of a model folder's README.md says of its licence."""
    path = folder / "README.md"
    if not path.exists():
        return {}
    try:
        data = ModelCard.load(path).data.to_dict()
    except (ValueError, OSError):
        return {}
    return {key: str(data[key]) for key in LICENCE_KEYS if data.get(key)}


def _is_id(name: str) -> bool:
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name
