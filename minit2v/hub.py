"""Where files come from, what a config may say, and strict loading: weights are made on `meta` and filled once.

Bad content raises ValueError, a file that is missing FileNotFoundError, a file that cannot be written or fetched
OSError: each in one line that names the file.
"""

import glob
import json
import os
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields as dataclass_fields
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minit2v_convert.rename import Layout, nearest

DIFFUSERS_VERSION = "0.30.0"  # the version whose file layout we write, as its own files say

# ---------------------------------------------------------------------------------------------- where files come from

Choose = Callable[[Sequence[str]], Sequence[str]]  # the names of the files in a folder -> those that are needed


def find_folder(
    path_or_id: str | Path,
    subfolder: str | None = None,
    choose: Choose | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    force_download: bool = False,
) -> tuple[Path, list[str]]:
    """A folder on this machine that has the files which `choose` picks, and their names.

    A local folder wins; anything else is a hub id, of which only the chosen files are fetched. Without `choose`: the
    small files (.json, .txt). `choose` raises FileNotFoundError when what it needs is not there.
    """
    choose = choose or (lambda names: [n for n in names if n.endswith((".json", ".txt"))])
    repo, here = str(path_or_id), Path(path_or_id).expanduser()
    label = f"{repo.rstrip('/')}/{subfolder}" if subfolder else repo
    if here.is_dir():
        return _choose_in(here, subfolder, choose, label)
    if here.is_file():
        raise ValueError(f"{repo} is a file: from_pretrained reads a folder or a hub id")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise FileNotFoundError(f"there is no folder {repo!r}, and a hub id is 'owner/name'")

    import huggingface_hub as hf
    from huggingface_hub import errors

    reason = "local_files_only" if local_files_only else "HF_HUB_OFFLINE" if hf.constants.HF_HUB_OFFLINE else ""
    if not reason:
        try:
            info = hf.HfApi(token=token).model_info(repo, revision=revision)
        except errors.GatedRepoError:
            raise OSError(f"{repo} is gated: accept its terms on its page, and log in or pass token=") from None
        except errors.RepositoryNotFoundError:
            raise FileNotFoundError(
                f"there is no folder {repo!r}, and the hub has no repository of that name (a private one needs token=)"
            ) from None
        except errors.RevisionNotFoundError:
            raise FileNotFoundError(f"{repo} has no revision {revision!r}") from None
        except Exception as error:  # the hub's library has had three HTTP libraries, each with its own exceptions
            reason = first_line(error)
            warnings.warn(f"the hub cannot be reached ({reason}): {repo} is read from the cache", stacklevel=4)
    if reason:
        cached = _cached_snapshot(hf, repo, revision, cache_dir)
        if cached is None:
            raise FileNotFoundError(f"{repo} is not in the cache, and the hub is not asked: {reason}")
        return _choose_in(cached, subfolder, choose, f"the cached copy of {label}")

    prefix = f"{subfolder}/" if subfolder else ""
    names = [s.rfilename.removeprefix(prefix) for s in info.siblings or () if s.rfilename.startswith(prefix)]
    if not names:
        there = sorted({s.rfilename.split("/")[0] for s in info.siblings or () if "/" in s.rfilename})
        raise FileNotFoundError(f"{label} does not exist; the folders there: {', '.join(there) or 'none'}")
    wanted = _named(choose, [n for n in names if "/" not in n], label)
    try:
        root = hf.snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            allow_patterns=[glob.escape(prefix + n) for n in wanted],
        )
    except Exception as error:
        raise OSError(f"fetching {label} failed: {first_line(error)}") from error
    return Path(root) / prefix, wanted


def _choose_in(root: Path, subfolder: str | None, choose: Choose, label: str) -> tuple[Path, list[str]]:
    folder = root / (subfolder or "")
    if not folder.is_dir():
        there = sorted(p.name for p in root.iterdir() if p.is_dir())
        raise FileNotFoundError(f"{label} does not exist; the folders there: {', '.join(there) or 'none'}")
    return folder, _named(choose, sorted(p.name for p in folder.iterdir() if p.is_file()), label)


def _named(choose: Choose, names: Sequence[str], label: str) -> list[str]:
    try:
        return list(choose(names))
    except FileNotFoundError as error:
        if "model_index.json" in names:
            raise FileNotFoundError(f"{label} is a whole pipeline: pass subfolder= for one of its parts") from None
        raise FileNotFoundError(f"{label} has no {error}") from None


def _cached_snapshot(hf: Any, repo: str, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    """The folder of the cache that holds this revision: <cache>/models--owner--name/snapshots/<commit>."""
    folder = Path(cache_dir or hf.constants.HF_HUB_CACHE) / ("models--" + repo.replace("/", "--"))
    ref = folder / "refs" / (revision or "main")
    snapshot = folder / "snapshots" / (ref.read_text() if ref.is_file() else revision or "main")
    return snapshot if snapshot.is_dir() else None


def need(*wanted: str) -> Choose:
    """Chooses exactly these files."""

    def choose(names: Sequence[str]) -> Sequence[str]:
        for name in wanted:
            if name not in names:
                raise FileNotFoundError(f"{name}; the files there: {', '.join(names) or 'none'}")
        return wanted

    return choose


def choose_weights(stem: str, variant: str | None, use_safetensors: bool | None) -> Choose:
    """config.json and the weights: `.safetensors` before `.bin`, one file before shards."""
    v = f".{variant}" if variant else ""
    kinds = [(stem, "safetensors"), ("pytorch_model" if stem == "model" else stem, "bin")]
    if use_safetensors is not None:
        kinds = kinds[:1] if use_safetensors else kinds[1:]

    def choose(names: Sequence[str]) -> Sequence[str]:
        config = need("config.json")(names)
        for stem, kind in kinds:
            if f"{stem}{v}.{kind}" in names:
                return [*config, f"{stem}{v}.{kind}"]
            # The variant stands before the number, in files of before 2025 behind it.
            number, v_ = r"-(\d{5})-of-(\d{5})", re.escape(v)
            shard = re.compile(rf"{re.escape(stem)}(?:{v_}{number}|{number}{v_})\.{kind}")
            if shards := sorted((n, m) for n in names if (m := shard.fullmatch(n))):
                count = int(shards[0][1][2] or shards[0][1][4])
                if len(shards) != count:
                    raise FileNotFoundError(f"more than {len(shards)} of the {count} shards of {stem}{v}.{kind}")
                return [*config, *(n for n, _ in shards)]
        there = [n for n in names if n.endswith((".safetensors", ".bin", ".ckpt", ".pth", ".pt", ".msgpack"))]
        wanted = " or ".join(f"{stem}{v}.{kind}" for stem, kind in kinds)
        raise FileNotFoundError(f"{wanted}; the weights there: {', '.join(there) or 'none'}")

    return choose


def read_json(path_or_id: str | Path, name: str, *, subfolder: str | None = None, **where: Any) -> dict[str, Any]:
    """The object in a JSON file of a folder or hub repository; `where` as in `find_folder`."""
    folder, _ = find_folder(path_or_id, subfolder, need(name), **where)
    return parse_json(folder / name)


def parse_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, that takes its place if all goes well and is removed if not: OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        if isinstance(error, Exception):  # each library that writes has its own
            raise OSError(f"cannot write {path}: {first_line(error)}") from error
        raise


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ------------------------------------------------------------------------------------------------ what a config may say

# Fields that describe a file's history, not a network.
HISTORY = (
    "_class_name",
    "_diffusers_version",
    "_name_or_path",
    "architectures",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "model_type",
)


def make_config(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of the frozen dataclass `cls` from the fields of a config file. Raises ValueError on unknown ones."""
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclass_fields(cls)]
    kept = {}
    for name, value in values.items():
        value = _tuples(value)
        if name in known:
            if not _fits(value, hints[name]):
                hint = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
                raise ValueError(f"{cls.__name__}: {name} must be {hint}, not {value!r}")
            kept[name] = value
        elif name in cls.FIXED:
            if value != _tuples(cls.FIXED[name]):
                raise ValueError(f"{cls.__name__}: only {name}={cls.FIXED[name]!r} is supported, not {value!r}")
        elif name not in cls.IGNORED and name not in HISTORY:
            raise ValueError(f"{cls.__name__} has no field {name!r}{nearest(name, [*known, *cls.FIXED])}")
    return cls(**kept)


def config_fields(config: Any) -> dict[str, Any]:
    """A config's fields as JSON has them, with those of which only one value is supported."""
    return {**config.FIXED, **{f.name: getattr(config, f.name) for f in dataclass_fields(config)}}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the annotated type. An int is a float, a bool is not an int."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        of = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(value) == len(of) and all(map(_fits, value, of))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return hint is Any or isinstance(value, origin or hint)


DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def pick_dtype(torch_dtype: torch.dtype | str | None = None, dtype: torch.dtype | str | None = None) -> torch.dtype:
    """The one dtype that two spellings of one argument mean; float32 where neither is given."""
    given = []
    for value in (torch_dtype, dtype):
        if value is not None:
            name = str(value).removeprefix("torch.")
            if name not in DTYPES:
                raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {value!r}{nearest(name, [*DTYPES])}")
            given.append(DTYPES[name])
    if len(set(given)) > 1:
        raise ValueError(f"torch_dtype={torch_dtype} and dtype={dtype} are one argument: give one")
    return given[0] if given else torch.float32


# ------------------------------------------------------------------------------------------------------------- weights


def open_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or `torch.save` file under their names, memory-mapped.

    A pickle may hold tensors and nothing else. Raises ValueError in one line that says what the file is instead.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` where it was cloned")
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path} is a web page, not weights: download the file itself")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        zipped = head.startswith(b"PK")  # what torch < 1.6 wrote cannot be mapped
        state = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a broken file breaks its reader anywhere
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path} is refused: its pickle wants {refused[1]}, which weights do not need") from None
        raise ValueError(f"{path} is broken ({path.stat().st_size} bytes): {first_line(error)}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not tensors by name")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path} holds a {type(value).__name__} under {name!r}, not a tensor")
    return state


def fill(model: "Network", files: Sequence[Path], dtype: torch.dtype) -> None:
    """Give a model on `meta` the weights of `files`, strictly. ValueError in one line where they do not fit it.

    Tensors that have `dtype` stay mapped. The others are cast one by one, and what has been read for that is let go
    every 256 MiB: at no time are there two copies of more than one tensor.
    """
    label = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    tensors = _open_all(files)
    expected = model.state_dict()
    try:
        found, unknown = model.layout.match(tensors)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    missing = list(model.layout.to_published({name: None for name in expected if name not in found}))
    unknown = sorted(unknown + [published for name, published in found.items() if name not in expected])
    shapes = []
    for name, published in found.items():
        have = model.layout.squeeze(name, tensors[published])
        if name in expected and have.shape != expected[name].shape:
            shapes.append(f"{published!r} is {tuple(have.shape)}, not {tuple(expected[name].shape)}")
    if missing or unknown or shapes:
        faults = [
            _list_some(len(missing), "missing", map(repr, missing)),
            _list_some(len(unknown), "unknown", (repr(n) + nearest(n, missing) for n in unknown)),
            _list_some(len(shapes), "of another shape", shapes),
        ]
        raise ValueError(f"{label} does not fit {type(model).__name__}: {'; '.join(f for f in faults if f)}")

    ready = {}
    unreleased = 0
    for name, published in found.items():
        x = model.layout.squeeze(name, tensors[published])
        if x.dtype == dtype:
            ready[name] = x
            continue
        try:
            ready[name] = _cast(x, dtype)
        except ValueError as error:
            raise ValueError(f"{label}: {published!r} {error}") from None
        unreleased += x.nbytes
        if unreleased > 2**28:
            del x, tensors
            tensors, unreleased = _open_all(files), 0
    model.load_state_dict(ready, assign=True)
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        if value.is_meta:
            raise RuntimeError(f"{type(model).__name__}: {name} has no values after loading; is it a hidden buffer?")


class _Weightless(TorchFunctionMode):
    """While networks are built on `meta`: no random numbers. (To draw none, PyTorch would import its compiler: 3 s.)"""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _open_all(files: Sequence[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in files:
        for name, value in open_weights(path).items():
            if name in tensors:
                raise ValueError(f"{path} repeats {name!r}, which another shard has")
            tensors[name] = value
    return tensors


def _list_some(count: int, what: str, items: Iterable[str]) -> str:
    """"2 missing ('a', 'b')", of many the first three."""
    shown = ", ".join(item for item, _ in zip(items, range(3), strict=False))
    return f"{count} {what} ({shown}{', ...' if count > 3 else ''})" if count else ""


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = x.to(dtype)
    if y.numel() and not all(map(torch.isfinite, torch.aminmax(y))):
        if not torch.isfinite(x).all():
            raise ValueError("holds NaN or infinity")
        raise ValueError(f"does not fit {dtype}: its largest value is {x.abs().max().item():.3g}")
    return y


def first_nonfinite(model: nn.Module) -> str | None:
    """The published name of the first parameter that holds NaN or infinity.

    For outputs that are not finite: tensors that stay mapped are not looked at when they are loaded.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            return next(iter(model.layout.to_published({name: None}))) if isinstance(model, Network) else name
    return None


class Network(nn.Module):
    """Base of the networks: configuration, strict loading, saving."""

    Config: ClassVar[type]
    layout: ClassVar[Layout]
    weights_name: ClassVar[str] = "diffusion_pytorch_model"  # "model": the file names are transformers'
    # What a config.json says about itself; None: diffusers' `_class_name`.
    head: ClassVar[dict[str, Any] | None] = None

    def __init__(self, config: Any = None, **fields: Any):
        """`config`, or the published config's fields as keywords. Raises ValueError on a field that does not exist."""
        super().__init__()
        if config is not None and not isinstance(config, self.Config):
            raise ValueError(f"config must be a {self.Config.__name__}; a dict goes through from_config")
        given = {f.name: getattr(config, f.name) for f in dataclass_fields(self.Config)} if config is not None else {}
        self.config = make_config(self.Config, {**given, **fields}) if fields or config is None else config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def published_state_dict(self) -> dict[str, Tensor]:
        """The parameters under the names of the published checkpoints."""
        return self.layout.to_published(self.state_dict())

    @classmethod
    def from_config(cls, config: Any, **overrides: Any) -> Self:
        """A network with random weights from a config.json's content or a Config, with some fields changed."""
        if isinstance(config, cls.Config):
            return cls(config, **overrides)
        if not isinstance(config, Mapping):
            raise ValueError(f"config must be a dict or a {cls.Config.__name__}, not a {type(config).__name__}")
        published = config.get("_class_name") or (config.get("architectures") or [cls.__name__])[0]
        if published != cls.__name__:
            raise ValueError(f"the config is that of a {published}, not of a {cls.__name__}")
        return cls(**{**config, **overrides})

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        use_safetensors: bool | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        **config_overrides: Any,
    ) -> Self:
        """The network of a local folder or a hub id, ready to run (`eval`).

        variant: "fp16" reads the files with that infix. torch_dtype or dtype: what the weights are cast to, float32 if
        not given; where the file has it already they stay memory-mapped. Other keywords change fields of the config.
        Raises FileNotFoundError on what is missing and ValueError on weights that do not fit, in one line each.
        """
        dtype = pick_dtype(torch_dtype, dtype)
        folder, names = find_folder(
            path_or_id,
            subfolder,
            choose_weights(cls.weights_name, variant, use_safetensors),
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            force_download=force_download,
        )
        config = parse_json(folder / "config.json")
        try:
            with torch.device("meta"), _Weightless():
                model = cls.from_config(config, **config_overrides)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        fill(model, [folder / name for name in names if name != "config.json"], dtype)
        return model.eval()

    def save_pretrained(
        self, folder: str | Path, *, safe_serialization: bool = True, variant: str | None = None
    ) -> None:
        """Write config.json and the weights under their published names, for us, diffusers and transformers to load.

        safe_serialization: `.safetensors`, else `.bin`. variant: the infix of the weights' file. A file that exists is
        replaced when the new one is complete; OSError where it cannot be.
        """
        stem = self.weights_name if safe_serialization or self.weights_name != "model" else "pytorch_model"
        infix = f".{variant}" if variant else ""
        with replacing(Path(folder) / f"{stem}{infix}.{'safetensors' if safe_serialization else 'bin'}") as temporary:
            state = {name: value.detach().cpu().contiguous() for name, value in self.published_state_dict().items()}
            if safe_serialization:
                from safetensors.torch import save_file

                save_file(state, temporary, metadata={"format": "pt"})
            else:
                torch.save(state, temporary)
        head = self.head or {"_class_name": type(self).__name__, "_diffusers_version": DIFFUSERS_VERSION}
        write_json(Path(folder) / "config.json", {**head, **config_fields(self.config)})
