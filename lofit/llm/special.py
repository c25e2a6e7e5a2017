"""Special tokens: what a checkpoint's files call them, and which ids end a generation."""

from pathlib import Path

from lofit.errors import InputError
from lofit.llm.config import ModelConfig
from lofit.llm.files import read_json

SETTINGS, MAP, GENERATION = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
NAMES = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def read_settings(folder: Path) -> dict:
    """tokenizer_config.json as a dict, {} where there is none.

    As in transformers, special_tokens_map.json is merged in where tokenizer_config.json has no
    added_tokens_decoder. Each of `NAMES` is a text or absent. Raises InputError.
    """
    found: dict = {}
    for name in (SETTINGS, MAP):
        path = folder / name
        if not path.exists() or (name == MAP and "added_tokens_decoder" in found):
            continue
        values = {key: value for key, value in read_json(path).items() if value is not None}
        for key in values.keys() & set(NAMES):
            values[key] = token_text(values[key], f"{path}: {key}")
        found |= values
    return found


def token_text(token: object, what: str) -> str:
    """The text of a token that is written as a text or as an object; InputError names `what`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise InputError(
            f"{what} is {str(token)[:60]!r}; expected a text, or an object with a text as content"
        )
    return text


def ending_ids(folder: Path, config: ModelConfig, named: int | None) -> tuple[int, ...]:
    """The ids that end a generation.

    As in transformers, generation_config.json's eos_token_id goes before config.json's: chat models
    name the end of a turn there. named: the id of eos_token, for files that have neither. Raises
    InputError if no file names one.
    """
    path = folder / GENERATION
    found = read_json(path).get("eos_token_id") if path.exists() else None
    ids = tuple(found) if isinstance(found, list) else () if found is None else (found,)
    for i in ids:
        if type(i) is not int or not 0 <= i < config.vocab_size:
            raise InputError(
                f"{path}: eos_token_id is {str(found)[:60]!r}; expected a whole number from 0 to"
                f" {config.vocab_size - 1}, or a list of them"
            )
    ids = ids or config.eos_token_id or (() if named is None else (named,))
    if not ids:
        raise InputError(
            f"{folder}: no file names the token that ends a text; write its number as eos_token_id"
            " into generation_config.json"
        )
    return ids


def end_of_text(eos_ids: tuple[int, ...], config: ModelConfig, named: int | None) -> int:
    """The id that a text without chat template is trained to end with.

    It is config.json's first eos_token_id, which is the one that documents ended with in
    pretraining; generation_config.json lists the ends of turns as well. It must end a generation:
    else eos_token by name, else the first of eos_ids.
    """
    return next(i for i in (*config.eos_token_id, named, *eos_ids) if i in eos_ids)
