"""One small interface over both kinds of tokenizer file: tokenizer.json and tokenizer.model."""

from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken
from tokenizers.models import WordLevel

from lofit.errors import InputError
from lofit.llm.config import ModelConfig
from lofit.llm.files import is_file, unreadable
from lofit.llm.folder import find_folder
from lofit.llm.special import added_tokens, end_of_text, ending_ids, read_settings


class Tokenizer:
    """Text to ids and back, with the ids that every other program gives.

    prefix, suffix: what the tokenizer file puts around a text: often a bos in front, sometimes
    nothing (SmolLM2), whatever config.json names. eos_ids: the ids that end a generation. end_id:
    the one of them that a text is trained to end with. A special token's text inside a text
    ("<|im_end|>") is that token, as in transformers and the servers: chat templates are written so,
    and a model that is trained here must be asked the same question elsewhere.
    n_rows: of the model's embedding; a text with an id beyond them is refused, and so is one that
    is no Unicode (InputError).
    """

    def __init__(
        self,
        backend: "_Json | _SentencePiece",
        prefix: list[int],
        suffix: list[int],
        eos_ids: tuple[int, ...],
        end_id: int,
        n_rows: int,
    ):
        self._backend, self.prefix, self.suffix = backend, prefix, suffix
        self.eos_ids, self.end_id, self.n_rows = eos_ids, end_id, n_rows

    def encode(self, text: str) -> list[int]:
        """Ids of a whole text."""
        return self.encode_pair(text, "")[0] + self.suffix

    def encode_pair(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Ids of prompt + answer tokenized jointly, and how many of them (the prefix too) are
        prompt. Without the suffix: the text goes on.

        A token that reaches into the answer counts as answer.
        """
        try:
            (prompt + answer).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"a text holds half a character ({error.object[error.start]!r}), which no tokenizer"
                f" reads; correct it: {error.object[max(0, error.start - 30) : error.start]!r}..."
            ) from None
        ids, n_prompt = self._backend.encode(prompt, answer)
        ids = self.prefix + ids
        if ids and max(ids) >= self.n_rows:
            raise InputError(
                f"the token {self._backend.name_of(max(ids))!r} has id {max(ids)}, but the model's"
                f" embedding has {self.n_rows} rows (vocab_size): its weights do not know that"
                " token; leave it out of the texts"
            )
        return ids, len(self.prefix) + n_prompt

    def decode(self, ids: list[int]) -> str:
        """Text of the ids without special tokens. Decode a prompt together with what follows it:
        a SentencePiece tokenizer drops the space in front of the first word."""
        return self._backend.decode(ids)

    @property
    def size(self) -> int:
        """Ids that stand for something; a model's vocabulary may be padded beyond them."""
        return self._backend.size

    @property
    def unk_id(self) -> int | None:
        """The id of text that no token stands for. None where there is no such text, or where the
        file names the end of a text for it, as byte-level tokenizers do."""
        return None if self._backend.unk_id in self.eos_ids else self._backend.unk_id

    def token(self, i: int) -> str:
        """An id as a person reads it: its text, or its name where it has none."""
        return self.decode([i]) or self._backend.name_of(i)

    def ids_with(self, text: str) -> frozenset[int]:
        """The ids whose own text has `text` in it, a single character."""
        return frozenset(i for i in range(self.size) if text in self.decode([i]))


class _Json:
    """A tokenizer.json; like transformers it gets the special tokens that only other files name."""

    def __init__(self, path: Path, settings: dict):
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise unreadable(path, f"not a tokenizer.json ({error})") from None
        self.backend.no_padding()
        self.backend.no_truncation()
        self.size = self.backend.get_vocab_size(with_added_tokens=False)
        named = added_tokens(path.parent, settings, self.id_of, self.backend.get_vocab_size())
        own = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        self.backend.add_tokens([t for _, t in sorted(named.items()) if t.content not in own])
        unk = getattr(self.backend.model, "unk_token", None)
        self.unk_id = None if unk is None else self.backend.token_to_id(unk)
        added = self.backend.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items()}
        self.eos_id = None  # the file does not say which token it is

    def encode(self, prompt: str, answer: str) -> tuple[list[int], int]:
        encoding = self.backend.encode(prompt + answer, add_special_tokens=False)
        return encoding.ids, sum(end <= len(prompt) for _, end in encoding.offsets)

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def name_of(self, i: int) -> str:
        return self.backend.id_to_token(i) or ""

    def around(self) -> tuple[list[int], list[int]]:
        """The ids that the post-processor puts before a text and after it."""
        encoding = self.backend.encode("a")
        own = [i for i, of_text in enumerate(encoding.sequence_ids) if of_text is not None]
        first, last = (own[0], own[-1]) if own else (len(encoding), len(encoding))
        return encoding.ids[:first], encoding.ids[last + 1 :]


class _SentencePiece:
    """A tokenizer.model, and the special tokens that other files name."""

    def __init__(self, path: Path, settings: dict):
        try:
            self.backend = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise unreadable(path, f"not a SentencePiece model ({error})") from None
        self.size = self.backend.get_piece_size()
        self.eos_id = None if self.backend.eos_id() < 0 else self.backend.eos_id()
        self.unk_id = self.backend.unk_id()
        control = set(filter(self.backend.is_control, range(self.size)))
        own = control | {self.backend.unk_id()}
        tokens = {i: AddedToken(self.backend.id_to_piece(i), special=i in control) for i in own}
        tokens |= added_tokens(path.parent, settings, self._piece, self.size)
        self.special = {token.content: i for i, token in tokens.items()}
        self.hidden = {i for i, token in tokens.items() if token.special}
        self.shown = {i: t.content for i, t in tokens.items() if i not in self.hidden | own}
        # It finds these tokens in a text as transformers does. What is between them is id 0.
        self.splitter = tokenizers.Tokenizer(WordLevel({"": 0}, unk_token=""))
        self.splitter.add_tokens(list(tokens.values()))

    def encode(self, prompt: str, answer: str) -> tuple[list[int], int]:
        text, ids, n_prompt = prompt + answer, [], 0
        found = self.splitter.encode(text, add_special_tokens=False)
        for i, (start, end) in zip(found.ids, found.offsets, strict=True):
            token = self.splitter.id_to_token(i)  # without spaces that belong to it in the text
            new = [self.special[token]] if i else self.backend.encode(text[start:end])
            n = len(new) if end <= len(prompt) else 0
            if start < len(prompt) < end and not i:
                n = self._n_within(new, prompt[start:])
            ids, n_prompt = ids + new, n_prompt + n
        return ids, n_prompt

    def _n_within(self, ids: list[int], prompt: str) -> int:
        """How many of the ids are prompt; character offsets would need the protobuf package."""
        n = len(ids)
        while not prompt.startswith(self.backend.decode(ids[:n])):
            n -= 1
        return n

    def decode(self, ids: list[int]) -> str:
        # ids past the end: rows that padded vocabularies have and no text stands for
        text, run = "", []
        for i in ids:
            if i in self.shown:
                text, run = text + self.backend.decode(run) + self.shown[i], []
            elif i < self.size and i not in self.hidden:
                run.append(i)
        return text + self.backend.decode(run)

    def id_of(self, token: str) -> int | None:
        return self.special.get(token, self._piece(token))

    def _piece(self, token: str) -> int | None:
        found = self.backend.piece_to_id(token)
        return found if self.backend.id_to_piece(found) == token else None

    def name_of(self, i: int) -> str:
        names = {number: name for name, number in self.special.items()}
        return names.get(i) or (self.backend.id_to_piece(i) if i < self.size else "")


def load_tokenizer(
    name: str | Path, revision: str | None = None, add_special_tokens: bool = True
) -> Tokenizer:
    """Load the tokenizer of a model folder or hub id; tokenizer.json goes before tokenizer.model.

    tokenizer.json's post-processor alone decides what is put around a text; like transformers 5 we
    then ignore add_bos_token. With a tokenizer.model a bos goes before it, unless add_bos_token is
    false. add_special_tokens: False for chat prompts, which contain their special tokens. A text is
    then trained to end with what the chat template writes after an answer, and a generation ends
    there too. Otherwise see `special.ending_ids` and `special.end_of_text`. Raises InputError.
    """
    folder = find_folder(name, revision)
    settings = read_settings(folder)
    backend: _Json | _SentencePiece
    if is_file(folder / "tokenizer.json"):
        backend = _Json(folder / "tokenizer.json", settings)
    elif is_file(folder / "tokenizer.model"):
        backend = _SentencePiece(folder / "tokenizer.model", settings)
    else:
        raise InputError(f"{folder}: neither tokenizer.json nor tokenizer.model in it")
    config = ModelConfig.from_file(folder / "config.json")
    if backend.size > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {backend.size} tokens, config.json's vocab_size is"
            f" {config.vocab_size}; are both files of the same model?"
        )
    named = _named(backend, settings, "eos")
    eos_ids = ending_ids(folder, config, backend.eos_id if named is None else named)
    end_id = end_of_text(eos_ids, config, named)
    if not add_special_tokens:
        prefix, suffix = [], []
        from lofit.llm.chat import end_of_turn  # starts a process that renders

        end_id = _first_special(backend, eos_ids, end_of_turn(folder), end_id)
        eos_ids = eos_ids if end_id in eos_ids else (*eos_ids, end_id)
    elif isinstance(backend, _Json):
        prefix, suffix = backend.around()
    else:
        bos = config.bos_token_id
        bos = _named(backend, settings, "bos") if bos is None else bos
        none = bos is None or settings.get("add_bos_token") is False
        prefix, suffix = [] if none else [bos], []
    return Tokenizer(backend, prefix, suffix, eos_ids, end_id, config.vocab_size)


def _named(backend: "_Json | _SentencePiece", settings: dict, kind: str) -> int | None:
    token = settings.get(f"{kind}_token")
    return None if token is None else backend.id_of(token)


def _first_special(
    backend: "_Json | _SentencePiece", eos_ids: tuple[int, ...], text: str, default: int
) -> int:
    """The id of the first special token in a text, or the default."""
    ids = {backend.name_of(i): i for i in eos_ids} | backend.special
    found = [(text.find(name), -len(name), i) for name, i in ids.items() if name and name in text]
    return min(found)[2] if found else default
