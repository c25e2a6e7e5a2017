"""Write the model card of an export: what it is, of which base, how well it does, how to use it."""

import re
import shlex
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from lofit.heads import attached_offsets
from lofit.llm.hub import SHIPPED, find_folder
from lofit.run.summary import results_table
from lofit.run.tuned import Tuned, read_results
from lofit.tasks import named_tasks

TEMPLATE = Path(__file__).with_name("card.md")
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
LICENCE_KEYS = ("license", "license_name", "license_link")
# Where exports of a class were measured to answer as the tuned model (docs/export.md). What is not
# here was not tried.
SEEN = {
    "llama": "vLLM 0.32.0 (CPU)",
    "gemma": "vLLM 0.32.0 (CPU) with `--model-impl transformers`. **vLLM's own Gemma 1 leaves"
    " biases of attention out and would serve the base model, without a word**",
    "gemma2": "vLLM 0.32.0 (CPU)",
    "gemma3_text": "vLLM 0.32.0 (CPU)",
}


def model_card(tuned: Tuned, form: str, name: str, checked: str = "") -> str:
    """README.md of an export. name: its hub id or folder; checked: what --check found."""
    info, base = tuned.info, tuned.model.source.name.partition("@")[0]
    # the hub refuses other names, and has none of our own folders
    hub_id = base if re.fullmatch(HUB_ID, base) and base.split("/")[0] not in SHIPPED else None
    data = ModelCardData(
        base_model=hub_id,
        library_name="transformers" if form == "hf" else form,
        pipeline_tag="text-generation",
        tags=["lofit", *([f"base_model:adapter:{hub_id}"] if hub_id and form == "peft" else [])],
        **licence_of(find_folder(tuned.base)),
    )
    # what evaluates these offsets as they were trained
    task, folder = str(info.get("task", "TASK")), info.get("data")
    command = ["python", "eval.py", "--model", tuned.base, "--task"]
    if folder and task in named_tasks():  # others are folders themselves
        command += [task, "--data", str(Path(folder).parent)]
    else:
        command += [folder or task]
    command += [f"--{flag}" for flag in ("chat", "plain") if info.get(flag)]
    for flag in ("dtype", "quantize"):
        value = info["settings"].get(flag)
        command += [f"--{flag}", value] if value not in (None, "stored") else []
    command += ["--offsets", str(tuned.path.parent)]
    heads, offsets = attached_offsets(tuned.model)
    results, _ = read_results(tuned)
    return str(
        ModelCard.from_template(
            data, TEMPLATE, form=form, name=name, base=base, source=tuned.model.source,
            method=tuned.method, info=info, heads=heads, n_values=offsets.numel(),
            results=results, table=results_table(results) if results else "",
            command=shlex.join(command), checked=checked,
            seen=SEEN.get(tuned.model.config.model_type) if form == "hf" else None,
        )
    )  # fmt: skip


def licence_of(folder: Path) -> dict[str, str]:
    """What the front matter of a model folder's README.md says of its licence."""
    try:
        path = folder / "README.md"
        data = ModelCard.load(path).data.to_dict() if path.exists() else {}
    except (ValueError, OSError):
        return {}
    return {key: str(data[key]) for key in LICENCE_KEYS if data.get(key)}
