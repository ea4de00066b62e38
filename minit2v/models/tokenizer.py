"""CLIP's tokenizer: text to byte-pair ids (Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2021, section 2.4).

A prompt is normalised (NFC, runs of white space to one space, lower case), split into words, digits and runs of other
symbols, and each piece's UTF-8 bytes are merged pair by pair, lowest rank first. The merging itself is Rust (the
`tokenizers` library); what is around it is here.

Ids are those of transformers' fast tokenizer, to the letter. That includes one trap: ModelScope pads with `!`, which
makes every `!` of a prompt a special token of its own, id 0, neither merged nor ended as in other models.
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
END = "</w>"  # the last symbol of a piece carries it
NAMED = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}

# Fields of tokenizer_config.json that change nothing here, and why.
IGNORED = {
    **dict.fromkeys(("is_local", "local_files_only", "merges_file", "name_or_path", "special_tokens_map_file",
                     "tokenizer_file", "vocab_file"), "where the file came from"),
    **dict.fromkeys(("max_length", "pad_to_multiple_of", "stride", "truncation_strategy"), "of the last call"),
    **dict.fromkeys(("auto_map", "backend", "init_inputs", "processor_class", "use_fast"), "of the code that saved it"),
    **dict.fromkeys(("clean_up_tokenization_spaces", "errors"), "of decoding"),
    "add_prefix_space": "of GPT-2's tokenizer",
    "pad_token_type_id": "of sentence pairs",
}
LONGEST_WORD = 200  # characters
NUMBERED = re.compile(r"(.+)_(\d{1,9})", re.S)  # a further vector of a word, as files name it
FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")  # what may be said of a token
# Fields of which these values are supported, the first is the usual one.
FIXED = {
    "do_lower_case": (True,),
    "padding_side": ("right",),
    "truncation_side": ("right",),
    "tokenizer_class": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "additional_special_tokens": ([],),
    "extra_special_tokens": ([], {}),
}


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for the bytes, in the order of their ids: `!` first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


def make_backend(model: "BPE") -> "Tokenizer":
    """CLIP's normalisation and splitting around a table of merges."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),  # keep what matches
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def learn_merges(words: Mapping[tuple[str, ...], int], count: int) -> list[tuple[str, str]]:
    """Up to `count` merges, the most frequent pair first, from words (as tuples of symbols) and how often each occurs.

    Each round counts all pairs anew: simple, the same on every machine, and meant for small vocabularies.
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
    """`word` with every occurrence of `pair`, from the left, made one symbol."""
    out, n = [], 0
    while n < len(word):
        size = 2 if word[n : n + 2] == pair else 1
        out.append("".join(word[n : n + size]))
        n += size
    return tuple(out)


class CLIPTokenizer:
    """Text to ids and back. Make one with `from_pretrained`, or with `train` for a model of your own.

    vocab: symbol -> id. merges: pairs of symbols, by rank. The four named tokens are strings, or mappings with the
    fields of transformers' AddedToken (`content`, `normalized`, `lstrip`, ...). added: further such mappings, each with
    the `id` that its file promises.
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
            raise ValueError(f"model_max_length={model_max_length} has no room for the first and the last token")
        self.model_max_length = int(model_max_length)
        added = list(added)
        by_content = {token["content"]: token for token in added}
        # A named token that the file's own list of tokens describes is that one.
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
                    f"the tokenizer's files give {token['content']!r} the id {token['id']}, the vocabulary makes it "
                    f"{self.backend.token_to_id(token['content'])}"
                )
        ids = map(self.backend.token_to_id, (self.bos_token, self.eos_token, self.pad_token))
        self.bos_token_id, self.eos_token_id, self.pad_token_id = ids
        self.backend.post_processor = processors.RobertaProcessing(
            (self.eos_token, self.eos_token_id), (self.bos_token, self.bos_token_id), False, False
        )
        self._find_words()

    # Words that stand for vectors of their own (textual inversion) ---------------------------------------------------

    @property
    def words(self) -> dict[str, list[int]]:
        """The words that were added to the vocabulary, each with its ids: one for each vector that it stands for.

        Files know a word of n vectors as n tokens, `word`, `word_1`, ..., `word_{n-1}`: diffusers made it so.
        """
        return {word: list(ids) for word, ids in self._words.items()}

    def add_word(self, word: str, count: int = 1) -> list[int]:
        """Let `word` stand for `count` new ids, wherever it is in a text, in upper or lower case; these ids.

        A word that begins and ends with letters or digits is found as a whole word, not within a longer one. Raises
        ValueError where it already means something: a piece of the vocabulary, or a word that was added.
        """
        from tokenizers import AddedToken

        if not isinstance(word, str):
            raise TypeError(f"a word must be a str, not {type(word).__name__}")
        if not 1 <= len(word) <= LONGEST_WORD or word != word.strip() or not _is_unicode(word):
            raise ValueError(f"{quoted(word)} is not a word: it must have 1 to {LONGEST_WORD} characters and no blanks "
                             "around them")  # fmt: skip
        if count < 1:
            raise ValueError(f"a word stands for at least one vector, not {count}")
        normal, there = self._normal(word), {self._normal(w): w for w in self.words}
        if normal in there:
            raise ValueError(f"there is a word {quoted(there[normal])} already: unload it first, or give another as "
                             "token=")  # fmt: skip
        tokens = self.backend.get_added_tokens_decoder().values()
        added = {self._normal(t.content) for t in tokens if not t.special}
        if normal not in added and any(self.backend.token_to_id(p) is not None for p in (word, normal, normal + END)):
            raise ValueError(f"the word {quoted(word)} is a piece of the vocabulary, and would change every prompt "
                             "that has it: give another as token=")  # fmt: skip
        parts = [f"{word}_{n}" for n in range(1, count + 1)]  # and the one that would be read as its next vector
        taken = (p for p in (word, *parts) if self._normal(p) in added or self.backend.token_to_id(p) is not None)
        clash = next(taken, None)
        part = NUMBERED.fullmatch(normal)
        if part and part[1] in there and len(self.words[there[part[1]]]) == int(part[2]):
            clash = there[part[1]]
        if clash is not None:
            raise ValueError(f"the words {quoted(word)} and {quoted(clash)}, which is there, would be read as one: "
                             "give another as token=")  # fmt: skip
        first = self.vocab_size
        whole = re.fullmatch(r"\w(.*\w)?", normal) is not None
        self.backend.add_tokens([AddedToken(t, normalized=True, single_word=whole) for t in [word, *parts[:-1]]])
        self._find_words()
        ids = list(range(first, first + count))
        if self.encode(word)[1:-1] != ids:
            self.remove_words([word])
            raise ValueError(f"the word {quoted(word)} would not be found in a prompt, because of a token of the "
                             "vocabulary within it: give another as token=")  # fmt: skip
        return ids

    def remove_words(self, words: Iterable[str]) -> list[int]:
        """Take words out of the vocabulary again; the ids that they had. Higher ids move down.

        Raises ValueError on a word that was not added.
        """
        known, gone = {self._normal(w): w for w in self.words}, set[int]()
        for word in words:
            if not isinstance(word, str) or (name := known.get(self._normal(word))) is None:
                raise ValueError(f"there is no word {quoted(word)}{nearest(word, list(known.values()))}")
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
        """How many ids there are, added tokens included: the rows that a text encoder needs."""
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of one text between the first and the last token, as many as there are."""
        if not isinstance(text, str):
            raise TypeError(f"a prompt must be a str, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is not valid Unicode: {error.reason} at character {error.start}") from None
        return [m for n in self.backend.encode(text).ids for m in self._ids.get(n, (n,))]

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of `ids`, special tokens included, a space after each piece."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return self.backend.decode(ids, skip_special_tokens=False).replace(END, " ").strip()

    def __call__(self, texts: str | list[str], max_length: int | None = None) -> Tensor:
        """texts -> ids (b l), l = max_length (default: model_max_length): cut to fit with a warning, or padded.

        Raises TypeError where a text is not a str, ValueError on an empty list, a length below 2 or broken Unicode.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list | tuple):
            raise TypeError(f"prompts must be a str or a list of str, not {type(texts).__name__}")
        if not texts:
            raise ValueError("the list of prompts is empty")
        length = self.model_max_length if max_length is None else max_length
        if length < 2:
            raise ValueError(f"max_length={length} has no room for the first and the last token")
        rows = []
        for text in texts:
            ids = self.encode(text)
            if len(ids) > length:
                cut = self.decode(ids[length - 1 : -1])
                warnings.warn(
                    f"the prompt has {len(ids)} tokens and {length} are read; cut off: {cut!r}", stacklevel=2
                )
                ids = [*ids[: length - 1], self.eos_token_id]
            rows.append(ids + [self.pad_token_id] * (length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, model_max_length: int = 77, pad_token: str = EOS
    ) -> Self:
        """A tokenizer with at most `vocab_size` ids, learned from `texts`, ids laid out as in CLIP.

        256 bytes, 256 bytes that end a piece, the merges by rank, the first and the last token. With fewer pairs in
        `texts` than asked for, the vocabulary is smaller. Deterministic. Raises ValueError on fewer than 514 ids.
        """
        from tokenizers.models import BPE

        symbols = byte_symbols()
        symbols += [s + END for s in symbols]
        if vocab_size < len(symbols) + 2:
            raise ValueError(f"vocab_size={vocab_size}: the bytes and the two special tokens alone are 514")
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
        """CLIP's own, as Stable Diffusion 1.5 has it; ModelScope pads with "!". The merges are in the package."""
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
        """A tokenizer folder of transformers: `tokenizer.json`, or `vocab.json` and `merges.txt`.

        Where the files contradict each other, what transformers does holds: `special_tokens_map.json` wins over
        `tokenizer_config.json`, unless the latter carries the newer `added_tokens_decoder`.
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
                    raise ValueError(f"{folder / name} has {size:,} bytes: no tokenizer has")
            return cls._read(folder, names)

    @classmethod
    def _read(cls, folder: Path, names: Sequence[str]) -> Self:
        def read(name: str) -> dict[str, Any]:
            return parse_json(folder / name) if name in names else {}

        config = read("tokenizer_config.json")
        _check_fields("tokenizer_config.json", config, (*NAMED, "model_max_length", "added_tokens_decoder"))
        named = {name: config[name] for name in NAMED if config.get(name) is not None}

        # Of tokenizer.json the vocabulary is read and no more: how text is split is CLIP's own and known.
        whole = read("tokenizer.json")
        if whole:
            model = whole.get("model", {})
            if not {"vocab", "merges"} <= model.keys():
                raise ValueError(f"{folder / 'tokenizer.json'} holds no byte-pair vocabulary")
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
            model_max_length=77 if length > 10**9 else length,  # 1e30 stands for "unknown" in these files
        )
        _check_merges(folder, vocab, merges, {BOS, EOS, *added, *map(_content, named.values())})
        return tokenizer

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files of a tokenizer folder, which transformers and `from_pretrained` read back: all or none."""
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
        if self._words:  # otherwise there are no tokens but those that are named
            tokens = sorted(self.backend.get_added_tokens_decoder().items())
            config["added_tokens_decoder"] = {str(n): {f: getattr(t, f) for f in FLAGS} for n, t in tokens}
        with filling(folder) as new:
            for name, text in texts.items():
                with replacing(new / name) as temporary:
                    temporary.write_text(text, encoding="utf-8")
            write_json(new / "special_tokens_map.json", named)
            write_json(new / "tokenizer_config.json", config)


def _check_table(path: Path, vocab: Any, merges: Any) -> None:
    """ValueError where this is not a vocabulary: symbols and their ids, each once from 0 on, and pairs of symbols."""
    if not isinstance(vocab, dict) or any(type(n) is not int for n in vocab.values()):
        raise ValueError(f"{path}: a vocabulary gives each symbol a whole number")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"{path}: the ids of a vocabulary are 0 to {len(vocab) - 1}, each once")
    if any(len(pair) != 2 or not all(isinstance(symbol, str) for symbol in pair) for pair in merges):
        raise ValueError(f"{path}: a merge is a pair of symbols")


def _check_merges(folder: Path, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], named: set[str]) -> None:
    """ValueError where merges are lost: prompts would silently become other ids."""
    made = {first + second for first, second in merges}
    lost = [s for s in vocab if len(s.removesuffix(END)) > 1 and s not in made and s not in named]
    if lost:
        raise ValueError(f"{folder}: the merges do not make {len(lost)} of the {len(vocab)} symbols of the vocabulary, "
                         f"such as {quoted(lost[0])}: some are lost")  # fmt: skip


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
    """A `tokenizers.AddedToken`. A bare string means a token that is looked for before the text is normalised."""
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    fields = {k: v for k, v in token.items() if k not in ("__type", "id")}
    for name, value in fields.items():
        if name not in FLAGS or not isinstance(value, str if name == "content" else bool):
            raise ValueError(f"the token {quoted(token['content'])} cannot have {quoted(name)} {quoted(value)}")
    return AddedToken(**(fields if special is None else fields | {"special": special}))
