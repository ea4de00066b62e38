"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): new words for prompts that stand for learned vectors.

The text encoder's token table gets a row for each vector. The tokenizer gets a word for these rows. Nothing else
changes.
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
LARGEST = 2**27  # bytes; a larger file is not tried as an embedding
PICTURES = {b"\x89PNG": "PNG", b"RIFF": "WebP", b"\xff\xd8\xff": "JPEG"}


class Parameters:
    """Replaces a ParameterDict in a pickle, and has its tensors by name."""

    def __init__(self, *_: Any):
        self.tensors: dict[str, Tensor] = {}

    def __setstate__(self, state: Any) -> None:
        """Read the attributes of a ParameterDict, whose tensors are in `_parameters`."""
        parameters = state.get("_parameters") if isinstance(state, dict) else None
        self.tensors = dict(parameters) if isinstance(parameters, dict) else {}


STAND_INS = {"torch.nn.modules.container ParameterDict": Parameters}


def load(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, sources: Sequence[tuple[Source, Any]], **where: Any
) -> dict[str, int]:
    """Add the words of all sources to the tokenizer and the text encoder. Returns {word: number of vectors}.

    sources: pairs (source, word). A source is a file, folder, hub id, state dict or tensor (n d) or (d). Its word is a
    text, a list of texts, or None for the word in the file. where: as in `find`.

    ValueError or TypeError if an embedding does not fit, or if a word is taken. Then nothing has changed.
    """
    _check(tokenizer, text_encoder)
    rows, dim = text_encoder.tokens.weight.shape
    if rows != tokenizer.vocab_size:
        raise ValueError(f"words cannot be added, because the tokenizer has {tokenizer.vocab_size:,} ids, but the text "
                         f"encoder {rows:,} rows: load both from the same model")  # fmt: skip
    new, room = copy.deepcopy(tokenizer), tokenizer.model_max_length - 2
    found: dict[str, Tensor] = {}
    for source, token in sources:
        label, words = read(source, **where)
        with read_from(label, (ValueError,)):
            for word, vectors in name(words, token).items():
                if vectors.shape[1] != dim:
                    raise ValueError(f"the vectors of {quoted(word)} have width {vectors.shape[1]}, but this text "
                                     f"encoder needs {dim}{_trained_for(vectors.shape[1])}")  # fmt: skip
                if len(vectors) > room:
                    raise ValueError(f"{quoted(word)} has {len(vectors)} vectors, but a prompt has room for {room}")
                new.add_word(word, len(vectors))
                try:
                    found[word] = cast(vectors, text_encoder.dtype)
                except ValueError as error:
                    raise ValueError(f"the vector of {quoted(word)} {error}") from None
    table = text_encoder.tokens.weight
    _set_rows(text_encoder, torch.cat([table.detach(), *(x.to(table.device) for x in found.values())]))
    vars(tokenizer).update(vars(new))
    for word, vectors in found.items():
        logger.info("The word %r now stands for %d vector%s.", word, len(vectors), "s" * (len(vectors) > 1))
    return {word: len(vectors) for word, vectors in found.items()}


def unload(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, words: Iterable[str] | None = None) -> None:
    """Remove words from both again. words: None removes all added words. ValueError on a word that was not added."""
    _check(tokenizer, text_encoder)
    gone = {*tokenizer.remove_words(tokenizer.words if words is None else words)}
    if gone:
        kept = [n for n in range(len(text_encoder.tokens.weight)) if n not in gone]
        _set_rows(text_encoder, text_encoder.tokens.weight.detach()[kept])


def _check(tokenizer: Any, text_encoder: Any) -> None:
    if not isinstance(tokenizer, CLIPTokenizer):
        raise TypeError(f"words can be added to a CLIPTokenizer of minit2v, not to a {type(tokenizer).__name__}")
    if not isinstance(text_encoder, CLIPTextModel) or not isinstance(text_encoder.tokens, nn.Embedding):
        raise TypeError(f"words can be added to a CLIPTextModel of minit2v with an nn.Embedding as its token table, "
                        f"not to a {type(text_encoder).__name__}")  # fmt: skip
    if "tokens" in lora.loras_of(text_encoder).originals:
        raise ValueError("a LoRA is fused into the text encoder's token table: call unfuse_lora(), change the words, "
                         "and fuse it again")  # fmt: skip


def _set_rows(text_encoder: CLIPTextModel, table: Tensor) -> None:
    embedding = text_encoder.tokens
    embedding.weight = nn.Parameter(table, requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = len(table)
    text_encoder.config = replace(text_encoder.config, vocab_size=len(table))


def describe(path: Path) -> list[str]:
    """Lines that describe the words in a file. Empty if it is not an embedding."""
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
    return f": the embedding was trained for {models[dim]}" if dim in models else ""


def name(words: dict[str | None, Tensor], token: Any) -> dict[str, Tensor]:
    """{word: vectors (n d)} with the words of `token` (a text or a list of texts), or the file's own words for None.
    """
    if token is None:
        if None in words:
            raise ValueError("the vectors have no word: give one as token=")
        return {word: x for word, x in words.items() if word is not None}
    tokens = [token] if isinstance(token, str) else list(token)
    if len(tokens) != len(words):
        there = ", ".join(quoted(w) for w in list(words)[:5] if w is not None) or "one without a name"
        raise ValueError(f"there are {len(words)} words ({there}), but token= names {len(tokens)}")
    if len({*tokens}) < len(tokens):
        raise ValueError("token= names a word twice")
    return dict(zip(tokens, words.values(), strict=True))


def read(source: Source, **where: Any) -> tuple[str, dict[str | None, Tensor]]:
    """(name of the source for messages, {word: vectors (n d)}). A word is None if the source has no name for it."""
    if isinstance(source, Tensor | Mapping):
        label = "the tensor" if isinstance(source, Tensor) else "the state dict"
        with read_from(label, (ValueError,)):
            return label, parse(source)
    path = find(source, **where)
    with path.open("rb") as file:
        head = file.read(4)
    if kind := next((kind for magic, kind in PICTURES.items() if head.startswith(magic)), None):
        raise ValueError(f"{path} is a {kind} picture: only AUTOMATIC1111 reads embeddings in pictures; save it there "
                         "as .pt")  # fmt: skip
    # No memory map: the rows are copied into the text encoder's table anyway, and the file may change later.
    content = open_file(path, mmap=False).tensors if is_safetensors(path) else load_pickle(path, False, STAND_INS)
    with read_from(path, (ValueError,)):
        words = parse(content)
    return str(path), {path.stem if w is None else w: x for w, x in words.items()}


def find(path_or_id: str | Path, *, weight_name: str | None = None, subfolder: str | None = None,
         use_safetensors: bool | None = None, **hub_arguments: Any) -> Path:  # fmt: skip
    """The path of an embedding's file: `path_or_id` itself, or a file in this folder or hub repository.

    There it is `weight_name`, else a file with the usual name, else the only file. Raises FileNotFoundError.
    """
    path_or_id = hub.local(path_or_id, **hub_arguments)
    here = Path(path_or_id).expanduser()
    if here.exists() and not here.is_dir():
        if weight_name is not None or subfolder is not None:
            raise ValueError(f"{path_or_id} is a file: weight_name and subfolder are only for folders and hub ids")
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
    """{word: vectors (n d)} from the content of a file. ValueError if it is not an embedding."""
    if isinstance(content, Tensor):
        return {None: _vectors("it", content)}
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not vectors by word")
    if "string_to_param" in content:
        return _parse_a1111(content)
    if odd := next((k for k in content if not isinstance(k, str)), None):
        raise ValueError(f"it is not an embedding: {quoted(odd)} is not a word")
    if {"clip_l", "clip_g"} & content.keys():
        raise ValueError("it is an embedding of SDXL, for two text encoders (clip_l, clip_g), but this model has one; "
                         'load its part for clip_l, as a state dict {word: load_file(path)["clip_l"]}')  # fmt: skip
    if odd := next((k for k in content if k.endswith((".weight", ".bias", ".alpha"))), None):
        raise ValueError(f"it is not an embedding: it has {quoted(odd)}; load LoRAs with load_lora_weights")
    if not content or len(content) > MOST_WORDS:
        raise ValueError(f"it is not an embedding: it has {len(content)} entries")
    if content.keys() == {"emb_params"}:
        return {None: _vectors("'emb_params'", content["emb_params"])}
    return {word: _vectors(quoted(word), x) for word, x in content.items()}


def _parse_a1111(content: Mapping[str, Any]) -> dict[str | None, Tensor]:
    """The format of rinongal's code, and later of AUTOMATIC1111. The vectors are stored under `*`.

    The word is in the field `name`. Without it, it is the name of the file.
    """
    params = content["string_to_param"]
    params = params.tensors if isinstance(params, Parameters) else params
    if isinstance(params, nn.ParameterDict):
        params = dict(params)
    if not isinstance(params, Mapping) or not params:
        raise ValueError(f"it is not an embedding: its string_to_param is {quoted(params)}")
    if odd := next((k for k, x in content.items() if isinstance(x, Tensor)), None):
        raise ValueError(f"beside string_to_param it has an unknown tensor {quoted(odd)}")
    if len(params) == 1:
        word = content.get("name")
        return {word if isinstance(word, str) and word else None: _vectors("'*'", *params.values())}
    return {str(word): _vectors(quoted(word), x) for word, x in params.items()}


def _vectors(label: str, x: Any) -> Tensor:
    """x (d,) or (n d) -> (n d), n >= 1."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{label} is a {type(x).__name__}, not vectors")
    if x.layout is not torch.strided or x.ndim not in (1, 2) or not x.numel():
        raise ValueError(f"{label} must be vectors (number, width) or one vector (width), not {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{label} must be floating-point vectors, not {x.dtype}")
    return x.detach().reshape(-1, x.shape[-1])
