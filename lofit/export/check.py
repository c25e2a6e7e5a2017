"""Whether stock transformers, on an export, answers as the tuned model does, or as its base."""

import importlib
from pathlib import Path

import torch

from lofit.errors import InputError
from lofit.files import read_jsonl, read_tensors
from lofit.heads import edits_off
from lofit.llm.chat import load_chat_template
from lofit.llm.generate import generate_all
from lofit.llm.hub import find_folder
from lofit.llm.tokenizer import load_tokenizer
from lofit.run.files import PREDICTIONS, find_edits
from lofit.run.tuned import Tuned

N, NEW_TOKENS = 20, 16
ENOUGH = 0.9  # of the answers: rounding may change one
NEEDED = {"hf": ("transformers",), "peft": ("transformers", "peft")}


def find_prompts(run: str, form: str) -> list[str]:
    """N prompts that eval.py asked. InputError if there are none, or if what is to
    answer them is not installed."""
    if form not in NEEDED:
        raise InputError(f"--check: stock transformers reads --format {' and '.join(NEEDED)} alone")
    for package in NEEDED[form]:
        try:
            importlib.import_module(package)
        except ImportError:
            raise InputError(
                f'--check: {package} is not installed; pip install -e ".[test]"'
            ) from None
    path = find_edits(run)
    info = {} if path.name == "config.json" else read_tensors(path)[1]
    # beside the run: where eval.py --offsets compared several
    beside = path.absolute().parent.with_name(f"{info.get('task')}-offsets")
    for folder in (path.parent, beside):
        if (folder / PREDICTIONS).exists():
            return [line["prompt"] for _, line in read_jsonl(folder / PREDICTIONS)][:N]
    path = path.with_name(PREDICTIONS)
    raise InputError(f"--check: {path}: no such file; run eval.py first, which writes it")


def check(tuned: Tuned, prompts: list[str], form: str, out: Path) -> str:
    """How many greedy answers of stock transformers on an export equal the tuned model's and the
    base model's, token by token, in fp32. InputError if too few equal the tuned model's."""
    import transformers

    model, chat = tuned.model.float(), bool(tuned.info.get("chat"))
    wrap, end = load_chat_template(tuned.base) if chat else (str, None)
    tokenizer, n = load_tokenizer(tuned.base, end), len(prompts)
    ids = [tokenizer.encode(wrap(prompt)) for prompt in prompts]
    ours = generate_all(model, ids, NEW_TOKENS, tokenizer.eos_ids, N, "tuned model")
    with edits_off(model):
        base = generate_all(model, ids, NEW_TOKENS, tokenizer.eos_ids, N, "base model")
    stock = _stock_answers(tuned.base, form, out, prompts, chat, tokenizer.eos_ids)
    as_tuned, as_base = (
        sum(a == b for a, b in zip(stock, answers, strict=True)) for answers in (ours, base)
    )
    found = (
        f"transformers {transformers.__version__} on this export: {as_tuned} of {n} answers equal"
        f" the tuned model's, {as_base} the base model's"
    )
    if as_tuned < ENOUGH * n:
        raise InputError(
            f"--check: {found}; expected at least {ENOUGH:.0%} of the tuned model's. Nothing was"
            " written; a --dtype that rounds more than the base's own may be the reason"
        )
    return found + (" (both answer alike: the check shows nothing)" if ours == base else "")


@torch.no_grad()
def _stock_answers(
    base: str, form: str, out: Path, prompts: list[str], chat: bool, eos: tuple[int, ...]
) -> list[list[int]]:
    """What stock programs generate from the prompts, asked one by one, up to eos."""
    import transformers

    whole = out if form == "hf" else find_folder(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    if form == "peft":
        import peft

        model = peft.PeftModel.from_pretrained(model, out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole)
    greedy = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=list(eos), pad_token_id=eos[0]
    )
    found = []
    for text in prompts:
        if chat:
            turns = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        asked = tokenizer(text, add_special_tokens=not chat, return_tensors="pt")
        ids, mask = asked.input_ids, asked.attention_mask
        new = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
        new = new[0, ids.shape[1] :].tolist()
        found.append(new[: next((i for i, t in enumerate(new) if t in eos), len(new))])
    return found
