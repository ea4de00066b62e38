"""CLIP's tokenizer: text to byte-pair ids (Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2021, section 2.4).

First the prompt is normalised: NFC, one space for any white space, lower case. Then it is split into words, digits and
groups of other symbols. The UTF-8 bytes of each piece are merged pair by pair, lowest rank first. The `tokenizers`
library (Rust) does the merging, and this module does the rest.

The ids are exactly those of transformers' fast tokenizer. That has one surprising effect: ModelScope pads with `!`.
So every `!` in a prompt is a special token with id 0, and is not merged as in other models.
"""

import copy
import gzip
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from minit2v_convert.rename import nearest
from minit2v_convert.stream import LARGEST_JSON

from ..files.config import quoted, read_from
from ..files.embedded import ASSETS
from ..files.hub import find_folder, parse_json, replacing, write_json
from ..files.saving import filling

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
END = "</w>"  # the suffix of the last symbol of a piece
NAMED = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}

# Fields of tokenizer_config.json that have no effect here, and what they are about.
IGNORED = {
    **dict.fromkeys(("is_local", "local_files_only", "merges_file", "name_or_path", "special_tokens_map_file",
                     "tokenizer_file", "vocab_file"), "the origin of the file"),
    **dict.fromkeys(("max_length", "pad_to_multiple_of", "stride", "truncation_strategy"), "the last call"),
    **dict.fromkeys(("auto_map", "backend", "init_inputs", "processor_class", "use_fast"), "the code that saved it"),
    **dict.fromkeys(("clean_up_tokenization_spaces", "errors"), "decoding"),
    "add_prefix_space": "GPT-2's tokenizer",
    "pad_token_type_id": "pairs of sentences",
}
LONGEST_WORD = 200  # characters
NUMBERED = re.compile(r"(.+)_(\d{1,9})", re.S)  # the name in files of a word's second, third, ... vector
FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")  # the fields of a token
# Fields that have only these supported values. The first is the usual one.
FIXED = {
    "do_lower_case": (True,),
    "padding_side": ("right",),
    "truncation_side": ("right",),
    "tokenizer_class": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "additional_special_tokens": ([],),
    "extra_special_tokens": ([], {}),
}


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for the 256 bytes, in the order of their ids. `!` is the first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


def make_backend(model: "BPE") -> "Tokenizer":
    """A tokenizer with CLIP's normalisation and splitting, and with these merges."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),  # it keeps the matches
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def learn_merges(words: Mapping[tuple[str, ...], int], count: int) -> list[tuple[str, str]]:
    """Learns up to `count` merges, the most frequent pair first. words: tuple of symbols -> how often it occurs.

    Each round counts all pairs again. This is simple, the same on every machine, and fast enough for small
    vocabularies.
    """
    words, merges = dict(words), []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        merged: Counter[tuple[str, ...]] = Counter()
        for word, n in words.items():
            merged[merge_pair(word, best)] += n
        words = dict(merged)
    return merges


def merge_pair(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """`word` with every occurrence of `pair` merged into one symbol, from left to right."""
    out, n = [], 0
    while n < len(word):
        size = 2 if word[n : n + 2] == pair else 1
        out.append("".join(word[n : n + size]))
        n += size
    return tuple(out)


class CLIPTokenizer:
    """Turns text into ids, and ids into text. Create it with `from_pretrained`, or with `train` for your own model.

    vocab: symbol -> id.
    merges: pairs of symbols, in the order of their rank.
    bos_token, eos_token, unk_token, pad_token: strings, or mappings with the fields of transformers' AddedToken
    (`content`, `normalized`, `lstrip`, ...).
    added: further such mappings, each with the `id` that its file gives it.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        bos_token: str | Mapping[str, Any] = BOS,
        eos_token: str | Mapping[str, Any] = EOS,
        unk_token: str | Mapping[str, Any] = EOS,
        pad_token: str | Mapping[str, Any] = EOS,
        model_max_length: int = 77,
        added: Iterable[Mapping[str, Any]] = (),
    ):
        from tokenizers import processors
        from tokenizers.models import BPE

        if model_max_length < 2:
            raise ValueError(f"model_max_length must be at least 2, for the first and the last token, not "
                             f"{model_max_length}")  # fmt: skip
        self.model_max_length = int(model_max_length)
        added = list(added)
        by_content = {token["content"]: token for token in added}
        # The file's list of tokens may describe a named token in more detail.
        named = [by_content.get(_content(t), t) for t in (bos_token, eos_token, unk_token, pad_token)]
        self.bos_token, self.eos_token, self.unk_token, self.pad_token = map(_content, named)

        try:
            model = BPE(dict(vocab), list(merges), unk_token=self.unk_token, end_of_word_suffix=END)
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"the tokenizer's vocabulary and merges do not fit together: {error}") from None
        self.backend = make_backend(model)
        self.backend.add_tokens([_added_token(t) for t in added] + [_added_token(t, special=True) for t in named])
        for token in added:
            if "id" in token and self.backend.token_to_id(token["content"]) != token["id"]:
                raise ValueError(
                    f"the tokenizer's files contradict each other: {token['content']!r} has the id {token['id']}, but "
                    f"{self.backend.token_to_id(token['content'])} by the vocabulary"
                )
        ids = map(self.backend.token_to_id, (self.bos_token, self.eos_token, self.pad_token))
        self.bos_token_id, self.eos_token_id, self.pad_token_id = ids
        self.backend.post_processor = processors.RobertaProcessing(
            (self.eos_token, self.eos_token_id), (self.bos_token, self.bos_token_id), False, False
        )
        self._find_words()

    # Words with their own vectors (textual inversion) ----------------------------------------------------------------

    @property
    def words(self) -> dict[str, list[int]]:
        """The words that were added to the vocabulary, each with its ids. A word has one id for each of its vectors.

        In files a word of n vectors is n tokens: `word`, `word_1`, ..., `word_{n-1}`. This is diffusers' convention.
        """
        return {word: list(ids) for word, ids in self._words.items()}

    def add_word(self, word: str, count: int = 1) -> list[int]:
        """Adds a word to the vocabulary. In texts it becomes `count` new ids, in upper or lower case. Returns the ids.

        If the word begins and ends with a letter or digit, it is not found inside a longer word.
        Raises ValueError if the word is already a piece of the vocabulary or an added word.
        """
        from tokenizers import AddedToken

        if not isinstance(word, str):
            raise TypeError(f"a word must be a str, not {type(word).__name__}")
        if not 1 <= len(word) <= LONGEST_WORD or word != word.strip() or not _is_unicode(word):
            raise ValueError(f"{quoted(word)} is not a word: it must have 1 to {LONGEST_WORD} characters, and no space "
                             "at its ends")  # fmt: skip
        if count < 1:
            raise ValueError(f"a word must have at least one vector, not {count}")
        normal, there = self._normal(word), {self._normal(w): w for w in self.words}
        if normal in there:
            raise ValueError(f"the word {quoted(there[normal])} was added before: unload it first, or pass another "
                             "word as token=")  # fmt: skip
        tokens = self.backend.get_added_tokens_decoder().values()
        added = {self._normal(t.content) for t in tokens if not t.special}
        if normal not in added and any(self.backend.token_to_id(p) is not None for p in (word, normal, normal + END)):
            raise ValueError(f"the word {quoted(word)} is a piece of the vocabulary, so every prompt with it would "
                             "change: pass another word as token=")  # fmt: skip
        parts = [f"{word}_{n}" for n in range(1, count + 1)]  # with the name that would be one vector more
        taken = (p for p in (word, *parts) if self._normal(p) in added or self.backend.token_to_id(p) is not None)
        clash = next(taken, None)
        part = NUMBERED.fullmatch(normal)
        if part and part[1] in there and len(self.words[there[part[1]]]) == int(part[2]):
            clash = there[part[1]]
        if clash is not None:
            raise ValueError(f"files could not tell the word {quoted(word)} from {quoted(clash)}, which was added "
                             "before: pass another word as token=")  # fmt: skip
        first = self.vocab_size
        whole = re.fullmatch(r"\w(.*\w)?", normal) is not None
        self.backend.add_tokens([AddedToken(t, normalized=True, single_word=whole) for t in [word, *parts[:-1]]])
        self._find_words()
        ids = list(range(first, first + count))
        if self.encode(word)[1:-1] != ids:
            self.remove_words([word])
            raise ValueError(f"the word {quoted(word)} would not be found in a prompt, because it contains another "
                             "token of the vocabulary: pass another word as token=")  # fmt: skip
        return ids

    def remove_words(self, words: Iterable[str]) -> list[int]:
        """Removes added words. Returns the ids that they had. Higher ids become smaller, so that there is no gap.

        Raises ValueError if a word was not added.
        """
        known, gone = {self._normal(w): w for w in self.words}, set[int]()
        for word in words:
            if not isinstance(word, str) or (name := known.get(self._normal(word))) is None:
                raise ValueError(f"the word {quoted(word)} was not added{nearest(word, list(known.values()))}")
            gone.update(self.words[name])
        model = json.loads(self.backend.to_str())["model"]
        tokens = sorted(self.backend.get_added_tokens_decoder().items())
        rest = [{flag: getattr(t, flag) for flag in FLAGS} for n, t in tokens if n not in gone]
        new = copy.copy(self)
        CLIPTokenizer.__init__(new, model["vocab"], [tuple(m) for m in model["merges"]], bos_token=self.bos_token,
                               eos_token=self.eos_token, unk_token=self.unk_token, pad_token=self.pad_token,
                               model_max_length=self.model_max_length, added=rest)  # fmt: skip
        vars(self).update(vars(new))
        return sorted(gone)

    def _normal(self, word: str) -> str:
        return self.backend.normalizer.normalize_str(word).strip()

    def _find_words(self) -> None:
        self._words: dict[str, list[int]] = {}
        for n, token in sorted(self.backend.get_added_tokens_decoder().items()):
            if token.special:
                continue
            part = NUMBERED.fullmatch(token.content)
            if part and len(self._words.get(part[1], ())) == int(part[2]):
                self._words[part[1]].append(n)
            else:
                self._words[token.content] = [n]
        self._ids = {ids[0]: ids for ids in self._words.values()}

    @property
    def vocab_size(self) -> int:
        """The number of ids, with added tokens. A text encoder needs that many rows."""
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of one text, with the first and the last token, not cut and not padded.

        Raises TypeError if `text` is not a str, and ValueError if it is not valid Unicode.
        """
        if not isinstance(text, str):
            raise TypeError(f"a prompt must be a str, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is not valid Unicode: {error.reason} at character {error.start}") from None
        return [m for n in self.backend.encode(text).ids for m in self._ids.get(n, (n,))]

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of `ids`, with special tokens and a space after each piece."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return self.backend.decode(ids, skip_special_tokens=False).replace(END, " ").strip()

    def __call__(self, texts: str | list[str], max_length: int | None = None) -> Tensor:
        """b texts -> ids (b l), with l = max_length (default: model_max_length).

        Longer texts are cut with a warning. Shorter texts are padded.
        Raises TypeError if a text is not a str. Raises ValueError if the list is empty, if max_length is below 2, or if
        a text is not valid Unicode.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list | tuple):
            raise TypeError(f"prompts must be a str or a list of str, not {type(texts).__name__}")
        if not texts:
            raise ValueError("the list of prompts is empty: give at least one text")
        length = self.model_max_length if max_length is None else max_length
        if length < 2:
            raise ValueError(f"max_length must be at least 2, for the first and the last token, not {length}")
        rows = []
        for text in texts:
            ids = self.encode(text)
            if len(ids) > length:
                cut = self.decode(ids[length - 1 : -1])
                warnings.warn(
                    f"the prompt has {len(ids)} tokens, but only {length} are read. Cut off: {cut!r}", stacklevel=2
                )
                ids = [*ids[: length - 1], self.eos_token_id]
            rows.append(ids + [self.pad_token_id] * (length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, model_max_length: int = 77, pad_token: str = EOS
    ) -> Self:
        """Learns a tokenizer with at most `vocab_size` ids from `texts`. The result is always the same.

        The order of the ids is CLIP's: 256 bytes, 256 bytes at the end of a piece, the merges by rank, the first and
        the last token. If `texts` have too few pairs, the vocabulary is smaller.
        Raises ValueError if vocab_size is below 514.
        """
        from tokenizers.models import BPE

        symbols = byte_symbols()
        symbols += [s + END for s in symbols]
        if vocab_size < len(symbols) + 2:
            raise ValueError(f"vocab_size must be at least 514, for bytes and special tokens, not {vocab_size}")
        splitter = make_backend(BPE())
        words: Counter[tuple[str, ...]] = Counter()
        for text in texts:
            for piece, _ in splitter.pre_tokenizer.pre_tokenize_str(splitter.normalizer.normalize_str(text)):
                words[(*piece[:-1], piece[-1] + END)] += 1
        merges = learn_merges(words, vocab_size - len(symbols) - 2)
        tokens = dict.fromkeys([*symbols, *(a + b for a, b in merges), BOS, EOS])
        vocab = {token: n for n, token in enumerate(tokens)}
        return cls(vocab, merges, pad_token=pad_token, model_max_length=model_max_length)

    @classmethod
    def clip(cls, pad_token: str = EOS) -> Self:
        """CLIP's tokenizer as in Stable Diffusion 1.5. ModelScope needs pad_token="!". It needs no download."""
        text = gzip.decompress((ASSETS / "clip" / "merges.txt.gz").read_bytes()).decode()
        merges = [(first, second) for first, second in map(str.split, text.splitlines())]
        symbols = byte_symbols()
        tokens = [*symbols, *(s + END for s in symbols), *map("".join, merges), BOS, EOS]
        return cls({token: n for n, token in enumerate(tokens)}, merges, pad_token=pad_token)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
    ) -> Self:
        """Loads a tokenizer folder of transformers: `tokenizer.json`, or `vocab.json` and `merges.txt`.

        path_or_id: a local folder or a hub id. The other arguments are those of `Network.from_pretrained`.
        If the files contradict each other, transformers' rule holds: `special_tokens_map.json` wins over
        `tokenizer_config.json`, unless the latter has the newer field `added_tokens_decoder`.
        Raises FileNotFoundError if a file is missing, and ValueError if the files are broken or not supported.
        """
        folder, names = find_folder(
            path_or_id,
            subfolder,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
        )

        with read_from(folder):
            for name in names:
                if (size := (folder / name).stat().st_size) > LARGEST_JSON:
                    raise ValueError(f"{folder / name} has {size:,} bytes: too many for a tokenizer")
            return cls._read(folder, names)

    @classmethod
    def _read(cls, folder: Path, names: Sequence[str]) -> Self:
        def read(name: str) -> dict[str, Any]:
            return parse_json(folder / name) if name in names else {}

        config = read("tokenizer_config.json")
        _check_fields("tokenizer_config.json", config, (*NAMED, "model_max_length", "added_tokens_decoder"))
        named = {name: config[name] for name in NAMED if config.get(name) is not None}

        # Only the vocabulary of tokenizer.json is read, because CLIP's way to split text is known.
        whole = read("tokenizer.json")
        if whole:
            model = whole.get("model", {})
            if not {"vocab", "merges"} <= model.keys():
                raise ValueError(f"{folder / 'tokenizer.json'} has no byte-pair vocabulary")
            vocab, merges = model["vocab"], model["merges"]
            merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]
            _check_table(folder / "tokenizer.json", vocab, merges)
        elif "vocab.json" in names and "merges.txt" in names:
            from tokenizers.models import BPE

            try:
                vocab, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
            except Exception as error:  # the library raises no narrower class
                raise ValueError(f"{folder}: vocab.json or merges.txt is broken: {error}") from None
            _check_table(folder / "vocab.json", vocab, merges)
        else:
            raise FileNotFoundError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt")

        if "added_tokens_decoder" in config:
            added = {t["content"]: {**t, "id": int(n)} for n, t in config["added_tokens_decoder"].items()}
        else:
            special = read("special_tokens_map.json")
            _check_fields("special_tokens_map.json", special, tuple(NAMED))
            named |= {name: special[name] for name in NAMED if special.get(name) is not None}
            contents = [_content(token) for token in named.values()]
            learned = read("added_tokens.json").items()
            added = {t: {"content": t, "id": n, "normalized": t not in contents} for t, n in learned}
            added |= {t["content"]: t for t in whole.get("added_tokens", [])}
        length = config.get("model_max_length")
        length = 77 if length is None else length
        if isinstance(length, bool) or not isinstance(length, int | float) or not 2 <= length < math.inf:
            raise ValueError(f"tokenizer_config.json: model_max_length must be at least 2, not {quoted(length)}")
        tokenizer = cls(
            vocab,
            merges,
            **named,
            added=sorted(added.values(), key=lambda t: t["id"]),
            model_max_length=77 if length > 10**9 else length,  # 1e30 means "unknown" in these files
        )
        _check_merges(folder, vocab, merges, {BOS, EOS, *added, *map(_content, named.values())})
        return tokenizer

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a tokenizer folder for transformers and `from_pretrained`. All files appear together or not at all."""
        whole = self.backend.to_str(pretty=True)
        model = json.loads(whole)["model"]
        texts = {
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False, separators=(",", ":")),
            "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""]),
            "tokenizer.json": whole,
        }
        described = {t.content: t for t in self.backend.get_added_tokens_decoder().values()}
        named = {}
        for name in NAMED:
            t = described[getattr(self, name)]
            flags = ("content", "lstrip", "normalized", "rstrip", "single_word")
            named[name] = {flag: getattr(t, flag) for flag in flags}
        config = {
            "add_prefix_space": False,
            **{name: {"__type": "AddedToken", **token} for name, token in named.items()},
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": self.model_max_length,
            "tokenizer_class": "CLIPTokenizer",
        }
        if self._words:  # otherwise all added tokens are named above
            tokens = sorted(self.backend.get_added_tokens_decoder().items())
            config["added_tokens_decoder"] = {str(n): {f: getattr(t, f) for f in FLAGS} for n, t in tokens}
        with filling(folder) as new:
            for name, text in texts.items():
                with replacing(new / name) as temporary:
                    temporary.write_text(text, encoding="utf-8")
            write_json(new / "special_tokens_map.json", named)
            write_json(new / "tokenizer_config.json", config)


def _check_table(path: Path, vocab: Any, merges: Any) -> None:
    """Raises ValueError unless vocab gives symbols ids from 0 on, each id once, and merges are pairs of symbols."""
    if not isinstance(vocab, dict) or any(type(n) is not int for n in vocab.values()):
        raise ValueError(f"{path}: the vocabulary must give each symbol a whole number as its id")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"{path}: the ids of the vocabulary must be 0 to {len(vocab) - 1}, each once")
    if any(len(pair) != 2 or not all(isinstance(symbol, str) for symbol in pair) for pair in merges):
        raise ValueError(f"{path}: each merge must be a pair of symbols")


def _check_merges(folder: Path, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], named: set[str]) -> None:
    """Raises ValueError if merges are missing, because prompts would silently become other ids."""
    made = {first + second for first, second in merges}
    lost = [s for s in vocab if len(s.removesuffix(END)) > 1 and s not in made and s not in named]
    if lost:
        raise ValueError(f"{folder}: merges are missing, for {len(lost)} of the {len(vocab)} symbols of the "
                         f"vocabulary, such as {quoted(lost[0])}: get the whole file again")  # fmt: skip


def _check_fields(file: str, fields: Mapping[str, Any], known: Sequence[str]) -> None:
    for name, value in fields.items():
        if name in FIXED and value not in FIXED[name]:
            raise ValueError(f"{file}: {name}={quoted(value)} is not supported, only {FIXED[name][0]!r}")
        if name not in FIXED and name not in IGNORED and name not in known:
            raise ValueError(f"{file}: unknown field {quoted(name)}{nearest(name, [*known, *FIXED, *IGNORED])}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _added_token(token: str | Mapping[str, Any], special: bool | None = None) -> Any:
    """A `tokenizers.AddedToken`. A plain string is a token that is searched before the text is normalised."""
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    fields = {k: v for k, v in token.items() if k not in ("__type", "id")}
    for name, value in fields.items():
        if name not in FLAGS or not isinstance(value, str if name == "content" else bool):
            raise ValueError(f"the token {quoted(token['content'])} has an unsupported field: "
                             f"{quoted(name)} {quoted(value)}")  # fmt: skip
    return AddedToken(**(fields if special is None else fields | {"special": special}))
