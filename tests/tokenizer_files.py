"""Small tokenizers of the kinds that checkpoints have, trained by their own libraries."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import sentencepiece
import tokenizers
from helpers import train_pieces
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from minipyramid.cli.terminal import DEFAULT_TEXT

# As Meta's code for Llama 3 has them: a second time, for the engine's own are compared with these.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
SPECIALS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
]  # fmt: skip
LANGUAGES = """
The quick brown fox doesn't jump; it'll walk, they've said I'M SURE we'd've known.
Der Fluß war groß, über 1234567 Ängste. Ça va? Où est-il allé, l'été dernier?
Лучшее, чем было. 今天天气很好。我们去公园。 こんにちは、元気ですね。
안녕하세요 세계 مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดี Việt Nam tôi καλημέρα
\U0001f98a\u200d\U0001f525 \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466
\U0001f1e9\U0001f1ea ❤\ufe0f
caf\u0065\u0301 \ufb01ne \u00bd ① x\u00b2 \U0001d4d7 \u0000 \u00a0 \u3000 \u2028 \u200b
def f(x: int) -> str:\n\treturn f"{x!r:>10}" if x != 0x1F else None  # 3.14e-10 && a||b <div class='x'>
""".strip().splitlines()


@functools.cache
def trained() -> tokenizers.Tokenizer:
    """A small byte-level BPE with Llama 3's regex and settings."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    prose = DEFAULT_TEXT.read_text(encoding="utf-8")[:100_000]
    tokenizer.train_from_iterator([prose, *LANGUAGES * 5], trainer)
    added = [tokenizers.AddedToken(content, special=True, normalized=False) for content in SPECIALS]
    tokenizer.add_special_tokens(added)
    begin = SPECIALS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return tokenizer


def write_json(directory: Path) -> int:
    """A `tokenizer.json` as Llama 3's repositories have it; returns the vocabulary's size."""
    trained().save(str(directory / "tokenizer.json"))
    settings = {"bos_token": SPECIALS[0], "eos_token": "<|eot_id|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return trained().get_vocab_size()


def write_pieces(directory: Path) -> int:
    """A sentencepiece model."""
    return int(sentencepiece.SentencePieceProcessor(model_file=str(train_pieces(directory))).vocab_size())


def write_llama2_json(directory: Path, legacy: bool = False) -> int:
    """A `tokenizer.json` as transformers saves a Llama 2 tokenizer: text with a space in front, and bytes."""
    directory.mkdir(exist_ok=True)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(train_pieces(directory)))
    (directory / "tokenizer.model").unlink()
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    pairs = [
        (vocab[token], (token[:i], token[i:]))
        for token in vocab
        if pieces.get_score(vocab[token]) < 0 or not pieces.is_byte(vocab[token])
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    model = models.BPE(vocab, [pair for _, pair in sorted(pairs)], byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    if legacy:
        spaces = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(spaces)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaced = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(spaced)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(pieces.vocab_size())
