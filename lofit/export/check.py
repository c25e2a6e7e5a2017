"""Whether stock transformers, on an export, answers as the tuned model does, or as its base."""

import importlib
from pathlib import Path

import torch

from lofit.errors import InputError
from lofit.export.folding import FoldedBase
from lofit.files import read_jsonl
from lofit.heads import edits_off
from lofit.llm.chat import load_chat_template
from lofit.llm.generate import generate_all
from lofit.llm.tokenizer import load_tokenizer
from lofit.run.adapters import Adapter, open_tuned
from lofit.run.artefacts import PREDICTIONS

N, NEW_TOKENS = 20, 16
ENOUGH = 0.9  # of the answers: rounding may turn one
NEEDED = {"hf": ("transformers",), "peft": ("transformers", "peft")}


def find_prompts(adapter: Adapter, form: str) -> list[str]:
    """N prompts that eval.py asked these offsets. InputError if there are none, or what is to
    answer them is not installed."""
    if form not in NEEDED:
        raise InputError(f"--check: stock transformers reads --format {' and '.join(NEEDED)} alone")
    try:
        for package in NEEDED[form]:
            importlib.import_module(package)
    except ImportError:
        raise InputError(
            f'--check: {package} is not installed; pip install -e ".[test]" has it'
        ) from None
    path = adapter.folder / PREDICTIONS
    if not path.exists():
        raise InputError(f"--check: {path}: no such file; run eval.py first, which writes it")
    prompts = [line.get("prompt") for _, line in read_jsonl(path)][:N]
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f"{path}: key 'prompt': expected a text; run eval.py again")
    return prompts


def check(base: FoldedBase, adapter: Adapter, name: str, form: str, out: Path) -> str:
    """How many greedy answers of transformers on an export (of the adapter `name`) equal the tuned
    model's and the base model's, token by token, in fp32. InputError if too few do."""
    import transformers

    prompts, chat = find_prompts(adapter, form), bool(adapter.info.get("chat"))
    model = open_tuned(adapter, name, base.name)
    tokenizer = load_tokenizer(base.folder, None, not chat)
    wrap = load_chat_template(base.folder) if chat else str
    ids, eos = [tokenizer.encode_pair(wrap(p), "")[0] for p in prompts], tokenizer.eos_ids
    tuned = generate_all(model, ids, NEW_TOKENS, eos, N, "tuned model")
    with edits_off(model):
        untuned = generate_all(model, ids, NEW_TOKENS, eos, N, "base model")
    del model
    answers = _answers(base.folder, form, out, prompts, chat, eos)

    n, as_tuned, as_base = len(prompts), _alike(answers, tuned), _alike(answers, untuned)
    found = (
        f"transformers {transformers.__version__} on this export: {as_tuned} of {n} answers equal"
        f" the tuned model's, {as_base} the base model's"
    )
    if as_tuned < ENOUGH * n:
        raise InputError(
            f"--check: {found}; expected at least {ENOUGH:.0%} of the tuned model's. Nothing was"
            " written; a --dtype that rounds more than the base's own may be the reason"
        )
    alike = _alike(tuned, untuned)
    return found + (" (which are the same: the check tells nothing)" if alike == n else "")


@torch.no_grad()
def _answers(
    folder: Path, form: str, out: Path, prompts: list[str], chat: bool, eos: tuple[int, ...]
) -> list[list[int]]:
    """What stock programs generate from texts, up to eos, asked one by one. folder: the base."""
    import transformers

    whole = out if form == "hf" else folder
    model = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    if form == "peft":
        import peft

        model = peft.PeftModel.from_pretrained(model, out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole)
    greedy = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=list(eos), pad_token_id=eos[0]
    )
    found = []
    for prompt in prompts:
        if chat:
            said = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        new = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
        new = new[0, ids.shape[1] :].tolist()
        found.append(new[: next((i for i, t in enumerate(new) if t in eos), len(new))])
    return found


def _alike(these: list, those: list) -> int:
    return sum(a == b for a, b in zip(these, those, strict=True))
