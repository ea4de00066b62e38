"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): words that stand for vectors which were learned.

The text encoder gets a row for each vector, the tokenizer a word that becomes these rows. All else stays as it was.
"""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minit2v_convert.stream import cast, is_safetensors, load_pickle, open_file

from ..files import hub
from ..files.config import quoted, read_from
from ..models.clip import CLIPTextModel
from ..models.tokenizer import CLIPTokenizer
from . import lora

logger = logging.getLogger(__name__)

Source = str | Path | Tensor | Mapping[str, Any]
FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
MOST_WORDS = 1000  # in a file
LARGEST = 2**27  # bytes, of a file that may be an embedding
PICTURES = {b"\x89PNG": "PNG", b"RIFF": "WebP", b"\xff\xd8\xff": "JPEG"}


class Parameters:
    """Stands for a ParameterDict in a pickle: its tensors by name."""

    def __init__(self, *_: Any):
        self.tensors: dict[str, Tensor] = {}

    def __setstate__(self, state: Any) -> None:
        """The attributes of a ParameterDict: its tensors are in `_parameters`."""
        parameters = state.get("_parameters") if isinstance(state, dict) else None
        self.tensors = dict(parameters) if isinstance(parameters, dict) else {}


STAND_INS = {"torch.nn.modules.container ParameterDict": Parameters}


def load(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, sources: Sequence[tuple[Source, Any]], **where: Any
) -> dict[str, int]:
    """Give both the words of all sources; {word: number of vectors}. Where one is refused, nothing has changed.

    sources: (file, folder, hub id, state dict or tensor; its word, a list of words, or None). where: as in `find`.
    """
    _check(tokenizer, text_encoder)
    rows, dim = text_encoder.tokens.weight.shape
    if rows != tokenizer.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size:,} ids, and the text encoder {rows:,} rows: they do "
                         "not belong together, and words cannot be added")  # fmt: skip
    new, room = copy.deepcopy(tokenizer), tokenizer.model_max_length - 2
    found: dict[str, Tensor] = {}
    for source, token in sources:
        label, words = read(source, **where)
        with read_from(label, (ValueError,)):
            for word, vectors in name(words, token).items():
                if vectors.shape[1] != dim:
                    raise ValueError(f"the vectors of {quoted(word)} have {vectors.shape[1]} numbers, and this text "
                                     f"encoder's have {dim}{_trained_for(vectors.shape[1])}")  # fmt: skip
                if len(vectors) > room:
                    raise ValueError(f"{quoted(word)} has {len(vectors)} vectors, and a prompt has room for {room}")
                new.add_word(word, len(vectors))
                try:
                    found[word] = cast(vectors, text_encoder.dtype)
                except ValueError as error:
                    raise ValueError(f"the vector of {quoted(word)} {error}") from None
    table = text_encoder.tokens.weight
    _set_rows(text_encoder, torch.cat([table.detach(), *(x.to(table.device) for x in found.values())]))
    vars(tokenizer).update(vars(new))
    for word, vectors in found.items():
        logger.info("%r is a word of prompts now, of %d vector%s.", word, len(vectors), "s" * (len(vectors) > 1))
    return {word: len(vectors) for word, vectors in found.items()}


def unload(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, words: Iterable[str] | None = None) -> None:
    """Take words, all where none are named, out of both again. ValueError on a word that is not there."""
    _check(tokenizer, text_encoder)
    gone = {*tokenizer.remove_words(tokenizer.words if words is None else words)}
    if gone:
        kept = [n for n in range(len(text_encoder.tokens.weight)) if n not in gone]
        _set_rows(text_encoder, text_encoder.tokens.weight.detach()[kept])


def _check(tokenizer: Any, text_encoder: Any) -> None:
    if not isinstance(tokenizer, CLIPTokenizer):
        raise TypeError(f"words can be added to a CLIPTokenizer of minit2v, not to a {type(tokenizer).__name__}")
    if not isinstance(text_encoder, CLIPTextModel) or not isinstance(text_encoder.tokens, nn.Embedding):
        raise TypeError("the text encoder's table of tokens is none that rows can be added to")
    if "tokens" in lora.loras_of(text_encoder).originals:
        raise ValueError("a LoRA is fused into the text encoder's table of tokens: unfuse_lora() before words come or "
                         "go, and fuse it again")  # fmt: skip


def _set_rows(text_encoder: CLIPTextModel, table: Tensor) -> None:
    embedding = text_encoder.tokens
    embedding.weight = nn.Parameter(table, requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = len(table)
    text_encoder.config = replace(text_encoder.config, vocab_size=len(table))


def describe(path: Path) -> list[str]:
    """The lines that say what words a file holds; none where it is not an embedding."""
    if path.stat().st_size > LARGEST:
        return []
    try:
        words = read(path)[1]
    except ValueError:
        return []
    of = ((word, *x.shape) for word, x in words.items())
    return ["textual inversion", *(f"{quoted(word)}: {n} vector{'s' * (n > 1)} of {dim} numbers{_trained_for(dim)}"
                                   for word, n, dim in of)]  # fmt: skip


def _trained_for(dim: int) -> str:
    models = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x, ModelScope or Zeroscope", 1280: "SDXL"}
    return f": they were trained for {models[dim]}" if dim in models else ""


def name(words: dict[str | None, Tensor], token: Any) -> dict[str, Tensor]:
    """The vectors under `token`, a word or a list of words, where it is given; else under the file's own words."""
    if token is None:
        if None in words:
            raise ValueError("the vectors have no word: give one as token=")
        return {word: x for word, x in words.items() if word is not None}
    tokens = [token] if isinstance(token, str) else list(token)
    if len(tokens) != len(words):
        there = ", ".join(quoted(w) for w in list(words)[:5] if w is not None) or "one without a name"
        raise ValueError(f"there are {len(words)} words ({there}), and token= names {len(tokens)}")
    if len({*tokens}) < len(tokens):
        raise ValueError("token= names a word twice")
    return dict(zip(tokens, words.values(), strict=True))


def read(source: Source, **where: Any) -> tuple[str, dict[str | None, Tensor]]:
    """(what it is called, {word: vectors (n d)}); a word is None where there is no name for it."""
    if isinstance(source, Tensor | Mapping):
        label = "the tensor" if isinstance(source, Tensor) else "the state dict"
        with read_from(label, (ValueError,)):
            return label, parse(source)
    path = find(source, **where)
    with path.open("rb") as file:
        head = file.read(4)
    if kind := next((kind for magic, kind in PICTURES.items() if head.startswith(magic)), None):
        raise ValueError(f"{path} is a {kind} picture: an embedding inside of one is read by AUTOMATIC1111 alone; "
                         "there it can be saved as .pt")  # fmt: skip
    # Copied: the rows go into the text encoder's table, and no file need stay as it is.
    content = open_file(path, mmap=False).tensors if is_safetensors(path) else load_pickle(path, False, STAND_INS)
    with read_from(path, (ValueError,)):
        words = parse(content)
    return str(path), {path.stem if w is None else w: x for w, x in words.items()}


def find(path_or_id: str | Path, *, weight_name: str | None = None, subfolder: str | None = None,
         use_safetensors: bool | None = None, **hub_arguments: Any) -> Path:  # fmt: skip
    """The file of an embedding: itself, or in a folder or hub repository, there under its usual name or alone."""
    path_or_id = hub.local(path_or_id, **hub_arguments)
    here = Path(path_or_id).expanduser()
    if here.exists() and not here.is_dir():
        if weight_name is not None or subfolder is not None:
            raise ValueError(f"{path_or_id} is a file, in which there is no weight_name or subfolder")
        return here
    if here.suffix in ENDINGS and not here.is_dir():
        raise FileNotFoundError(f"there is no file {str(path_or_id)!r}")

    def choose(names: Sequence[str]) -> Sequence[str]:
        if weight_name is not None:
            return hub.need(weight_name)(names)
        fitting = [n for n in names if n.endswith(ENDINGS)]
        if use_safetensors is not None:
            fitting = [n for n in fitting if n.endswith(".safetensors") == use_safetensors]
        for usual in FILES:
            if usual in fitting:
                return [usual]
        if len(fitting) == 1:
            return fitting
        raise FileNotFoundError(f"{FILES[0]}; give one of its files as weight_name=: {', '.join(fitting) or 'none'}")

    folder, (chosen,) = hub.find_folder(path_or_id, subfolder, choose, **hub_arguments)
    return folder / chosen


def parse(content: Any) -> dict[str | None, Tensor]:
    """{word: vectors (n d)} out of what a file holds. ValueError where that is not an embedding."""
    if isinstance(content, Tensor):
        return {None: _vectors("it", content)}
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not vectors by word")
    if "string_to_param" in content:
        return _parse_a1111(content)
    if odd := next((k for k in content if not isinstance(k, str)), None):
        raise ValueError(f"it is not an embedding: {quoted(odd)} is not a word")
    if {"clip_l", "clip_g"} & content.keys():
        raise ValueError("it is an embedding of SDXL, for two text encoders (clip_l, clip_g): here is one; the part of "
                         'clip_l alone can be given, as the state dict {word: load_file(path)["clip_l"]}')  # fmt: skip
    if odd := next((k for k in content if k.endswith((".weight", ".bias", ".alpha"))), None):
        raise ValueError(f"it is not an embedding: it has {quoted(odd)}; LoRAs are loaded with load_lora_weights")
    if not content or len(content) > MOST_WORDS:
        raise ValueError(f"it is not an embedding: it has {len(content)} entries")
    if content.keys() == {"emb_params"}:
        return {None: _vectors("'emb_params'", content["emb_params"])}
    return {word: _vectors(quoted(word), x) for word, x in content.items()}


def _parse_a1111(content: Mapping[str, Any]) -> dict[str | None, Tensor]:
    """AUTOMATIC1111's, and before it rinongal's: the word stands for `*`, and is the name, or the file's."""
    params = content["string_to_param"]
    params = params.tensors if isinstance(params, Parameters) else params
    if isinstance(params, nn.ParameterDict):
        params = dict(params)
    if not isinstance(params, Mapping) or not params:
        raise ValueError(f"it is not an embedding: its string_to_param is {quoted(params)}")
    if odd := next((k for k, x in content.items() if isinstance(x, Tensor)), None):
        raise ValueError(f"beside string_to_param it has the tensor {quoted(odd)}, of which nothing is known")
    if len(params) == 1:
        word = content.get("name")
        return {word if isinstance(word, str) and word else None: _vectors("'*'", *params.values())}
    return {str(word): _vectors(quoted(word), x) for word, x in params.items()}


def _vectors(label: str, x: Any) -> Tensor:
    """x (d,) or (n d) -> (n d), n >= 1."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{label} is a {type(x).__name__}, not vectors")
    if x.layout is not torch.strided or x.ndim not in (1, 2) or not x.numel():
        raise ValueError(f"{label} is {tuple(x.shape)}: a word has vectors (number, width), or one (width)")
    if not x.is_floating_point():
        raise ValueError(f"{label} is of {x.dtype}: vectors are floating-point numbers")
    return x.detach().reshape(-1, x.shape[-1])
