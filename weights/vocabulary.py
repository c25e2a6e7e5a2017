"""The tokenizers of the miniature models, made from the world's own text."""

import io
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from lofit.files import write, write_json
from weights.corpus import Corpus

PIECES = 2048  # most names are one piece


def documents(corpus: Corpus) -> Iterator[str]:
    """What the corpus says in 300 training steps."""
    rng = random.Random("vocabulary")
    return (doc for _ in range(300) for doc in corpus.step(rng))


def write_words(corpus: Corpus, folder: Path) -> dict:
    """Write tokenizer.json, one token per word of the world; returns config.json's values for it.

    White space only separates, a line break is a token. "A:Norvia" and "A: Norvia" give the same
    ids, and decoding writes the prompt formats' own spacing ("A:" is followed by none).
    """
    split = pre_tokenizers.Split(Regex(r"\n|[QA]:|'s|[\w-]+|[^\w\s]"), "removed", invert=True)
    words = {w for doc in documents(corpus) for w, _ in split.pre_tokenize_str(doc)}
    words |= {name for names in corpus.world.entities.values() for name in names}
    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),  # joins by spaces, none before , . ?
            decoders.Fuse(),
            decoders.Replace("A: ", "A:"),
            decoders.Replace(Regex(r" ?\n ?"), "\n"),
            decoders.Replace(Regex(r" (?=[;)”])|(?<=[(“]) "), ""),
        ]
    )
    write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True} | special
    write_json(folder / "tokenizer_config.json", settings)
    return {"vocab_size": len(vocab), "bos_token_id": 1, "eos_token_id": 2}


def write_pieces(corpus: Corpus, folder: Path) -> dict:
    """Write tokenizer.model, a SentencePiece BPE with Gemma's settings and special ids; returns
    config.json's values for it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=documents(corpus), model_writer=model, model_type="bpe",
        vocab_size=PIECES, byte_fallback=True, character_coverage=1.0, num_threads=1,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
        control_symbols=["<mask>"], user_defined_symbols=["\n"], max_sentence_length=100_000,
        minloglevel=2,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
    )  # fmt: skip
    write(folder / "tokenizer.model", model.getvalue())
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True} | special
    write_json(folder / "tokenizer_config.json", settings)
    return {"vocab_size": PIECES, "bos_token_id": 2, "eos_token_id": 1}
