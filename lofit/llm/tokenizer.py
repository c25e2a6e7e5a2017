"""One small interface over both kinds of tokenizer file: tokenizer.json and tokenizer.model."""

import re
from itertools import accumulate
from pathlib import Path

import sentencepiece
import tokenizers

from lofit.errors import InputError, warn
from lofit.files import read_json, reading
from lofit.llm.config import ModelConfig
from lofit.llm.hub import find_folder

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Text to ids and back, with the ids that transformers gives.

    prefix: what goes before a text, often a bos, sometimes nothing (SmolLM2), whatever config.json
    names. eos_ids: the ids that end a generation; end_id: the one of them that a text is trained to
    end with. A special token's text inside a text ("<|im_end|>") is that token: chat templates are
    written so. n_rows: of the model's embedding.
    """

    def __init__(self, backend, prefix: list[int], eos_ids: tuple[int, ...], end_id, n_rows: int):
        self.backend, self.prefix, self.n_rows = backend, prefix, n_rows
        self.eos_ids, self.end_id, self.size = eos_ids, end_id, backend.size
        # byte-level tokenizers read everything, and some name the end of a text as "unknown"
        self.unk_id = None if backend.unk_id in eos_ids else backend.unk_id
        self.warned = False

    def encode_pair(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Ids of prompt + answer tokenized jointly, and how many of them (the prefix too) are
        prompt: apart they can have other tokens than together. A token that reaches into the answer
        counts as answer."""
        try:
            (prompt + answer).encode()
        except UnicodeEncodeError as error:
            before = error.object[max(0, error.start - 30) : error.start]
            raise InputError(
                f"a text holds half a character after {before!r}, which no tokenizer reads"
            ) from None
        ids, n_prompt = self.backend.encode(prompt, answer)
        if ids and max(ids) >= self.n_rows:
            raise InputError(
                f"the token {self.backend.name_of(max(ids))!r} has id {max(ids)}, but the model's"
                f" embedding has {self.n_rows} rows: its weights do not know that token; leave it"
                " out of the texts"
            )
        if self.prefix and ids[: len(self.prefix)] == self.prefix and not self.warned:
            self.warned = True
            warn(
                f"a text brings its own {self.token(self.prefix[0])!r}, and the tokenizer puts"
                " another in front, as in other programs; leave it out of the texts"
            )
        return self.prefix + ids, len(self.prefix) + n_prompt

    def encode(self, text: str) -> list[int]:
        return self.encode_pair(text, "")[0]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids without special tokens. Decode a prompt together with what follows it:
        SentencePiece drops the space in front of the first word."""
        return self.backend.decode(ids)

    def token(self, i: int) -> str:
        """An id as a person reads it: its text, or its name where it has none."""
        return self.decode([i]) or self.backend.name_of(i)

    def ids_with(self, text: str) -> frozenset[int]:
        """The ids whose own text has `text` in it, a single character."""
        return frozenset(i for i in range(self.size) if text in self.decode([i]))


class JsonFile:
    """A tokenizer.json. It says itself what goes around a text."""

    def __init__(self, path: Path, added: dict[int, str]):
        """added: tokens that tokenizer_config.json names; like transformers we add those that the
        file does not have."""
        try:
            self.file = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{path}: not a tokenizer.json ({error}); fetch it again") from None
        self.file.no_padding()
        self.file.no_truncation()
        self.file.add_special_tokens([t for t in added.values() if self.id_of(t) is None])
        decoder = self.file.get_added_tokens_decoder()
        self.special = {i for i, token in decoder.items() if token.special}
        self.size = self.file.get_vocab_size(with_added_tokens=False)
        unknown = getattr(self.file.model, "unk_token", None)
        self.unk_id = None if unknown is None else self.file.token_to_id(unknown)

    def encode(self, prompt: str, answer: str) -> tuple[list[int], int]:
        found = self.file.encode(prompt + answer, add_special_tokens=False)
        return found.ids, sum(end <= len(prompt) for _, end in found.offsets)

    def decode(self, ids: list[int]) -> str:
        return self.file.decode(ids, skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self.file.token_to_id(token)

    def name_of(self, i: int) -> str:
        return self.file.id_to_token(i) or ""

    def prefix(self, bos: int | None) -> list[int]:
        """What its post-processor puts before a text; like transformers 5 we ignore `bos`."""
        found = self.file.encode("a")
        own = [i for i, of_text in enumerate(found.sequence_ids) if of_text is not None]
        return found.ids[: own[0]] if own else found.ids


class SentencePieceFile:
    """A tokenizer.model, and the special tokens that tokenizer_config.json adds."""

    def __init__(self, path: Path, added: dict[int, str]):
        try:
            self.file = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{path}: not a SentencePiece model ({error})") from None
        self.size, self.unk_id = self.file.get_piece_size(), self.file.unk_id()
        control = filter(self.file.is_control, range(self.size))
        # SentencePiece reads its control tokens as ordinary text: they are split out beforehand
        self.special = {i: self.file.id_to_piece(i) for i in control} | added
        names = sorted(self.special.values(), key=len, reverse=True)
        self.splitter = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None

    def encode(self, prompt: str, answer: str) -> tuple[list[int], int]:
        text, ids, ends, start = prompt + answer, [], [], 0
        for part in self.splitter.split(text) if self.splitter else [text]:
            special = self.id_of(part) if self.splitter and self.splitter.fullmatch(part) else None
            if special is not None:
                ids, ends = [*ids, special], [*ends, start + len(part)]
            elif part:
                found = self.file.encode(part, return_type="offset_mapping")
                ids += found["ids"]
                ends += [start + end for end in _whole_ends(found["offsets"])]
            start += len(part)
        return ids, sum(end <= len(prompt) for end in accumulate(ends, max))

    def decode(self, ids: list[int]) -> str:
        # ids past the end: rows that padded vocabularies have and no text stands for
        return self.file.decode([i for i in ids if i < self.size and i not in self.special])

    def id_of(self, token: str) -> int | None:
        found = self.file.piece_to_id(token)
        added = {name: i for i, name in self.special.items()}
        return added.get(token, found if self.file.id_to_piece(found) == token else None)

    def name_of(self, i: int) -> str:
        return self.special.get(i) or (self.file.id_to_piece(i) if i < self.size else "")

    def prefix(self, bos: int | None) -> list[int]:
        return [] if bos is None else [bos]


def _whole_ends(offsets: list[tuple[int, int]]) -> list[int]:
    """Where the text of each piece ends. Of a character in several pieces all but the last one are
    empty and stand before it; they end where it ends."""
    ends, following = [], 0
    for start, end in reversed(offsets):
        following = end if end > start or not ends else following
        ends.append(following)
    return ends[::-1]


def load_tokenizer(name: str | Path, end_of_turn: str | None = None) -> Tokenizer:
    """The tokenizer of a model folder or hub id; tokenizer.json goes before tokenizer.model.

    end_of_turn: what a chat template writes after an answer (`chat.load_chat_template`). Prompts
    then bring their special tokens, and an answer is trained to end as the template ends it.
    """
    folder = find_folder(name)
    config, settings = ModelConfig.from_file(folder / "config.json"), read_settings(folder)
    with reading(folder / "tokenizer_config.json"):
        decoder = settings.get("added_tokens_decoder") or {}
        added = {int(i): token_text(token) for i, token in decoder.items()}
    if (folder / "tokenizer.json").is_file():
        backend = JsonFile(folder / "tokenizer.json", added)
    elif (folder / "tokenizer.model").is_file():
        backend = SentencePieceFile(folder / "tokenizer.model", added)
    else:
        raise InputError(f"{folder}: neither tokenizer.json nor tokenizer.model in it")
    if backend.size > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {backend.size} tokens, config.json's vocab_size is"
            f" {config.vocab_size}; are both files of the same model?"
        )
    eos_ids = _eos_ids(folder, config, backend.id_of(settings.get("eos_token") or ""))
    # a text ends as documents did in pretraining; generation_config.json adds the ends of turns
    end_id = next((i for i in config.eos_token_id if i in eos_ids), eos_ids[0])
    bos = None if settings.get("add_bos_token") is False else config.bos_token_id
    prefix = backend.prefix(bos)
    if end_of_turn is not None:
        prefix = []
        turn = backend.encode(end_of_turn, "")[0]
        # the first special one; a lone space before it may decode to nothing, too
        end_id = next((i for i in turn if i in backend.special), end_id)
        eos_ids = eos_ids if end_id in eos_ids else (*eos_ids, end_id)
    return Tokenizer(backend, prefix, eos_ids, end_id, config.vocab_size)


def read_settings(folder: Path) -> dict:
    """tokenizer_config.json as a dict, each of NAMES as a text or null. As in transformers,
    special_tokens_map.json goes first where it has no added_tokens_decoder."""
    path, beside = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    found = read_json(path) if path.exists() else {}
    if "added_tokens_decoder" not in found and beside.exists():
        found |= {key: value for key, value in read_json(beside).items() if value is not None}
    with reading(path):
        named = {key: token_text(found[key]) for key in NAMES if found.get(key) is not None}
    return found | named


def token_text(token: str | dict) -> str:
    """Files write a special token as a text, or as an object with its text as content."""
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str) or not text.isprintable():  # half a surrogate pair is not
        raise ValueError(f"a special token is {str(token)[:60]!r}")
    return text


def _eos_ids(folder: Path, config: ModelConfig, named: int | None) -> tuple[int, ...]:
    """As in transformers, generation_config.json goes before config.json: chat models name the end
    of a turn there. named: the id of eos_token, for folders that have neither."""
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.exists() else None
    with reading(path):
        ids = (found,) if isinstance(found, int) else tuple(found or config.eos_token_id)
    ids = ids or (() if named is None else (named,))
    if not ids:
        raise InputError(
            f"{folder}: no file names the token that ends a text; write its number as eos_token_id"
            " into generation_config.json"
        )
    if not all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
        raise InputError(f"{path}: eos_token_id {str(ids)[:60]}: not all in the vocabulary")
    return ids
