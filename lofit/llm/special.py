"""Special tokens: what a checkpoint's files call them, and which ids end a generation."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken

from lofit.errors import InputError
from lofit.llm.config import ModelConfig
from lofit.llm.files import read_json

SETTINGS, MAP, GENERATION = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
ADDED = "added_tokens.json"
FLAGS = ("single_word", "lstrip", "rstrip")
NAMES = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
CLASS_NAMES = {
    "Llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Gemma": {
        "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>",
    },
}  # fmt: skip


def read_settings(folder: Path) -> dict:
    """tokenizer_config.json as a dict; each of `NAMES` is a text, None or absent, and nothing else
    is None.

    As in transformers, special_tokens_map.json is merged in where tokenizer_config.json has no
    added_tokens_decoder. Raises InputError.
    """
    path, beside = folder / SETTINGS, folder / MAP
    found = read_json(path) if path.exists() else {}
    _check_names(found, path)
    if "added_tokens_decoder" not in found and beside.exists():
        named = {key: value for key, value in read_json(beside).items() if value is not None}
        _check_names(named, beside)
        found = found | named
    return {key: value for key, value in found.items() if value is not None or key in NAMES}


def template_tokens(folder: Path, settings: dict) -> dict[str, str]:
    """The special tokens by name, for a chat template; those that no file names are the ones of the
    tokenizer's class."""
    found = CLASS_NAMES.get(_class_of(folder, settings), {}) | settings
    return {key: found[key] for key in NAMES if found.get(key) is not None}


def _check_names(values: dict, path: Path) -> None:
    """Make each of `NAMES` a text."""
    for key in values.keys() & set(NAMES):
        if values[key] is not None:
            values[key] = token_text(values[key], f"{path}: {key}")


def _class_of(folder: Path, settings: dict) -> str:
    """The tokenizer's class; with a tokenizer.model alone, that of the model's family."""
    name, config = settings.get("tokenizer_class"), folder / "config.json"
    if name is None and not (folder / "tokenizer.json").exists() and config.exists():
        name = "Llama" if read_json(config).get("model_type") == "llama" else "Gemma"
    return str(name).removesuffix("Fast").removesuffix("Tokenizer")


def token_text(token: object, what: str) -> str:
    """The text of a token that is written as a text or as an object; InputError names `what`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):  # half a pair
        raise InputError(
            f"{what} is {str(token)[:60]!r}; expected a text, or an object with a text as content"
        )
    return text


def added_tokens(
    folder: Path, settings: dict, piece: Callable[[str], int | None], n: int
) -> dict[int, AddedToken]:
    """The special tokens that other files name beside a tokenizer's own, which has n, by id.

    piece: the id of a text that the tokenizer has. Ids are those of tokenizer_config.json's
    added_tokens_decoder, or else of added_tokens.json. A token that only has a name has the
    tokenizer's id, or else the next one, as in transformers. Raises InputError.
    """
    path, found = folder / ADDED, {}
    if "added_tokens_decoder" in settings:
        path = folder / SETTINGS
        for i, token in _of_kind(settings["added_tokens_decoder"], dict, path).items():
            found[_id(i, path)] = _added(token, path)
    elif path.exists():
        for text, i in read_json(path).items():
            found[_id(i, path)] = AddedToken(text)
    named = [settings[key] for key in NAMES if settings.get(key) is not None]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = _of_kind(settings.get(key, []), (list, dict), folder / SETTINGS)
        named += extra.values() if isinstance(extra, dict) else extra
    for token in named:
        text = token_text(token, f"{folder / SETTINGS}: a special token")
        known = next((i for i, added in found.items() if added.content == text), piece(text))
        i = max([n - 1, *found]) + 1 if known is None else known
        flags = {key: getattr(found[i], key) for key in FLAGS} if i in found else {}
        found[i] = AddedToken(text, **flags, special=True)
    return found


def _added(token: object, path: Path) -> AddedToken:
    text = token_text(token, f"{path}: an added token")
    keys = (*FLAGS, "normalized", "special")
    flags = {key: token[key] for key in keys if key in token} if token != text else {}
    for value in flags.values():
        _of_kind(value, bool, path)
    return AddedToken(text, **flags)


def _id(value: object, path: Path) -> int:
    """A token's id; tokenizer_config.json writes it as a text."""
    i = int(value) if isinstance(value, str) and value.isdecimal() else value
    if type(i) is not int or not 0 <= i < 10**9:
        raise InputError(
            f"{path}: {str(value)[:60]!r} is no id of an added token; expected a whole number"
        )
    return i


def _of_kind(value: object, kind: type | tuple, path: Path) -> object:
    if not isinstance(value, kind):
        raise InputError(
            f"{path}: {str(value)[:60]!r} among the added and special tokens; expected tokens as"
            " transformers writes them"
        )
    return value


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
