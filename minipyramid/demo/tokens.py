"""Which part of a text each of its tokens is."""

import codecs
from dataclasses import replace

from minipyramid.demo.picture import Token
from minipyramid.tokenizer import Tokenizer


def tokens_of(tokenizer: Tokenizer, prompt: str, prompt_ids: list[int], new_ids: list[int]) -> list[Token]:
    """Each token's part of the text; of a prompt they join to the prompt.

    A character of several byte tokens is the last one's part. A special token's part is what it is written
    as, if it stands in the prompt itself, and nothing if it was put there.
    """
    specials = {token: content for content, token in tokenizer.special_tokens.items()}
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    start = int(tokenizer.add_bos)
    tokens = []
    spaced = [start]  # indices of tokens before which a space was set that the prompt does not have
    for i, token in enumerate(prompt_ids + new_ids):
        data = tokenizer.token_bytes(token)
        written = specials.get(token, "") if start <= i < len(prompt_ids) else ""
        text = decoder.decode(data) or written
        if written and tokenizer.adds_space_again:
            spaced.append(i + 1)
        tokens.append(Token(text, text or specials.get(token) or "".join(f"<0x{byte:02X}>" for byte in data)))
    if "".join(token.text for token in tokens[: len(prompt_ids)]) != prompt:
        for i in spaced:
            if i < len(prompt_ids):
                tokens[i] = replace(tokens[i], text=tokens[i].text.removeprefix(" "))
    return tokens
