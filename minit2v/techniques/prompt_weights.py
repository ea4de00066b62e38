"""Weighted words and prompts of any length, with the rules of A1111's web UI. docs/prompts.md explains them.

    (word)  (word:1.3)  [word]  BREAK  \\( \\)

A prompt is cut into chunks of as many tokens as the text encoder reads: 75, and the first and the last token. Each
chunk is encoded separately. The state of a token is multiplied by the token's weight. Then the states of the chunk are
scaled so that their mean does not change. At the end the states of all chunks are concatenated.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models.tokenizer import CLIPTokenizer

WEIGHTS = ("a1111",)
STEP = 1.1  # the factor of a pair of ( ), the divisor of a pair of [ ]
BACK = 20  # a chunk may be this many tokens shorter to end with a comma
TOKEN = re.compile(r"\\[()\[\]\\]|\\|[()\[\]]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")
BREAK = re.compile(r"\s*\bBREAK\b\s*")
LOOKS_WEIGHTED = re.compile(r"\([^()]*:\s*[+-]?\d*\.?\d+\s*\)|\(\(|\[\[|\bBREAK\b")


@dataclass
class Chunk:
    """Tokens and their weights, without the text encoder's first and last token."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def parse(text: str) -> list[tuple[str, float] | None]:
    """The pieces of a prompt with their weights. None stands for the end of a chunk (BREAK)."""
    pieces: list[list] = []  # [text or None, weight]
    rounds: list[int] = []  # pieces at which open brackets begin
    squares: list[int] = []

    def scale(begin: int, factor: float) -> None:
        for piece in pieces[begin:]:
            piece[1] *= factor

    for match in TOKEN.finditer(text):
        found, number = match[0], match[1]
        if found.startswith("\\") and len(found) == 2:
            pieces.append([found[1], 1.0])
        elif found == "(":
            rounds.append(len(pieces))
        elif found == "[":
            squares.append(len(pieces))
        elif number is not None and rounds and is_number(number):
            scale(rounds.pop(), float(number))
        elif found == ")" and rounds:
            scale(rounds.pop(), STEP)
        elif found == "]" and squares:
            scale(squares.pop(), 1 / STEP)
        else:
            for i, part in enumerate(BREAK.split(found)):
                pieces += [[None, 1.0]] * (i > 0) + [[part, 1.0]]
    for begin in rounds:
        scale(begin, STEP)
    for begin in squares:
        scale(begin, 1 / STEP)
    joined: list[tuple[str, float] | None] = []
    for piece, weight in pieces:
        last = joined[-1] if joined else None
        if piece is None:
            joined.append(None)
        elif last is not None and last[1] == weight:
            joined[-1] = (last[0] + piece, weight)
        else:
            joined.append((piece, weight))
    return joined


def is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", text) is not None


def chunks(tokenizer: CLIPTokenizer, text: str) -> list[Chunk]:
    """The prompt in chunks, at least one.

    A full chunk ends after its last comma if that is among the last 20 tokens, so that no phrase is cut.
    """
    size = tokenizer.model_max_length - 2
    comma = tokenizer.encode(",")[1:-1]
    found, chunk, after_comma = [], Chunk(), 0  # after_comma: where the last phrase begins, or 0
    for piece in parse(text):
        if piece is None:
            found.append(chunk)
            chunk, after_comma = Chunk(), 0
            continue
        for token in tokenizer.encode(piece[0])[1:-1]:
            if [token] != comma and len(chunk.ids) == size and 0 < after_comma and size - after_comma < BACK:
                rest = Chunk(chunk.ids[after_comma:], chunk.weights[after_comma:])
                found.append(Chunk(chunk.ids[:after_comma], chunk.weights[:after_comma]))
                chunk, after_comma = rest, 0
            if len(chunk.ids) == size:
                found.append(chunk)
                chunk, after_comma = Chunk(), 0
            chunk.ids.append(token)
            chunk.weights.append(piece[1])
            if [token] == comma:
                after_comma = len(chunk.ids)
    return [*found, chunk] if chunk.ids or not found else found


def encode(
    tokenizer: CLIPTokenizer, text_encoder: Callable[[Tensor], Tensor], texts: list[str], count: int
) -> Tensor:
    """b texts -> states (b count*l d). The text encoder maps ids (b l) to states (b l d), l at a time.

    Prompts with fewer than `count` chunks get empty chunks at the end.
    """
    rows, weights = [], []
    for text in texts:
        row = chunks(tokenizer, text)
        for chunk in row + [Chunk()] * (count - len(row)):
            rest = tokenizer.model_max_length - 2 - len(chunk.ids)
            end = [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * rest
            rows.append([tokenizer.bos_token_id, *chunk.ids, *end])
            weights.append([1.0, *chunk.weights, *[1.0] * len(end)])
    states = text_encoder(torch.tensor(rows))
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    weighted = wide * torch.tensor(weights).to(wide)[..., None]
    mean, mean_weighted = (x.mean((1, 2), keepdim=True) for x in (wide, weighted))
    plain = torch.tensor([set(row) == {1.0} for row in weights]).to(wide.device)[:, None, None]
    states = torch.where(plain, wide, weighted * (mean / mean_weighted)).to(states.dtype)
    return states.reshape(len(texts), -1, states.shape[-1])
