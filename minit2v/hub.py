"""Where files come from, and the base of the networks, which are read from them and written to them.

Bad content raises ValueError, a file that is missing FileNotFoundError, a file that cannot be written or fetched
OSError: each in one line that names the file.
"""

import glob
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from minit2v_convert.folders import is_original
from minit2v_convert.rename import Layout, nearest
from minit2v_convert.stream import first_line as first_line
from minit2v_convert.stream import json_text
from minit2v_convert.stream import parse_json as parse_json
from minit2v_convert.stream import replacing as replacing

from .compat import compat_fields
from .config import config_fields, make_config
from .config import pick_dtype as pick_dtype
from .weights import Weightless, fill, fill_from
from .weights import first_nonfinite as first_nonfinite
from .weights import open_weights as open_weights

DIFFUSERS_VERSION = "0.30.0"  # the version whose file layout we write, as its own files say
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
    from huggingface_hub import constants  # no attribute of `hf` before somebody has imported it

    offline = "local_files_only" if local_files_only else "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else ""
    if not offline:
        try:
            info = hf.HfApi(token=token).model_info(repo, revision=revision)
        except Exception as error:
            _raise_refusal(error, repo, revision)
            offline = first_line(error)
            warnings.warn(f"the hub cannot be reached ({offline}): {repo} is read from the cache", stacklevel=3)
    if offline:
        cached = _cached_snapshot(hf, repo, revision, cache_dir)
        if cached is None:
            raise FileNotFoundError(f"{repo} is not in the cache, and the hub is not asked: {offline}")
        return _choose_in(cached, subfolder, choose, f"the cached copy of {label}")

    prefix = f"{subfolder}/" if subfolder else ""
    files = [s.rfilename for s in info.siblings or ()]
    names = [f.removeprefix(prefix) for f in files if f.startswith(prefix)]
    if not names:
        raise _no_folder(label, {f.split("/")[0] for f in files if "/" in f})
    wanted = _named(choose, [n for n in names if "/" not in n], label)
    try:
        root = Path(
            hf.snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                force_download=force_download,
                allow_patterns=[glob.escape(prefix + n) for n in wanted],
            )
        )
    except Exception as error:
        _raise_refusal(error, repo, revision)
        raise OSError(f"fetching {label} failed: {first_line(error)}") from error
    if absent := [n for n in wanted if not (root / prefix / n).is_file()]:  # its answer when the line breaks down
        raise OSError(f"fetching {label} failed: {', '.join(absent)} did not come")
    return root / prefix, wanted


def _raise_refusal(error: Exception, repo: str, revision: str | None) -> None:
    """Says in a line what the hub will not give. Other errors pass: the hub's library has had three HTTP libraries
    below it, each with its own."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        raise OSError(f"{repo} is gated: accept its terms on its page, and log in or pass token=") from None
    if isinstance(error, errors.RepositoryNotFoundError):
        raise FileNotFoundError(
            f"there is no folder {repo!r}, and the hub has no repository of that name (a private one needs token=)"
        ) from None
    if isinstance(error, errors.RevisionNotFoundError):
        raise FileNotFoundError(f"{repo} has no revision {revision!r}") from None
    if isinstance(error, errors.HFValidationError):
        raise ValueError(f"{repo!r} is no folder and no hub id: {first_line(error)}") from None


def _no_folder(label: str, there: Iterable[str]) -> FileNotFoundError:
    return FileNotFoundError(f"{label} does not exist; the folders there: {', '.join(sorted(there)) or 'none'}")


def _choose_in(root: Path, subfolder: str | None, choose: Choose, label: str) -> tuple[Path, list[str]]:
    folder = root / (subfolder or "")
    if not folder.is_dir():
        raise _no_folder(label, (p.name for p in root.iterdir() if p.is_dir()))
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


def find_config(config: str | Path | Mapping[str, Any], component: str, **where: Any) -> tuple[dict[str, Any], str]:
    """The config.json of a component, and where it is: of a pipeline's folder or hub id, of its own, or that file.

    A dictionary is itself; `where` as in `find_folder`.
    """
    from minit2v_convert.convert import config_in

    if isinstance(config, Mapping):
        return dict(config), "config"
    here = Path(config).expanduser()
    if here.exists():
        if (found := config_in(here, component)) is None:
            raise FileNotFoundError(f"{config} has no config.json for the {component}")
        return dict(found[0]), found[1]
    try:
        return read_json(config, "config.json", subfolder=component, **where), f"{config}/{component}/config.json"
    except FileNotFoundError:
        return read_json(config, "config.json", **where), f"{config}/config.json"


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json_text(content), encoding="utf-8")


class Network(nn.Module):
    """Base of the networks: configuration, strict loading, saving."""

    Config: ClassVar[type]
    layout: ClassVar[Layout]
    weights_name: ClassVar[str] = "diffusion_pytorch_model"  # "model": the file names are transformers'
    # What a config.json says about itself; None: diffusers' `_class_name`.
    head: ClassVar[dict[str, Any] | None] = None

    def __init__(self, config: Any = None, *, compat: str | None = None, **fields: Any):
        """`config`, or the published config's fields as keywords. compat: as in `set_compat`.

        Raises ValueError on a field that does not exist.
        """
        super().__init__()
        if config is not None and not isinstance(config, self.Config):
            raise ValueError(f"config must be a {self.Config.__name__}; a dict goes through from_config")
        given = {f.name: getattr(config, f.name) for f in dataclass_fields(self.Config)} if config is not None else {}
        self.config = make_config(self.Config, {**given, **fields}) if fields or config is None else config
        self.explicit = frozenset(fields)  # passed in code: `set_compat` leaves them alone
        self.compat: str | None = None
        self.set_compat(compat)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def set_compat(self, compat: str | None) -> Self:
        """Set the fields in which we deviate as this mode has them (compat.py), except those passed in code.

        None changes nothing. Raises ValueError on an unknown mode.
        """
        if compat is not None:
            forced = compat_fields(type(self).__name__, compat)
            self.config = replace(self.config, **{n: v for n, v in forced.items() if n not in self.explicit})
            self.compat = compat
        return self

    def published_state_dict(self) -> dict[str, Tensor]:
        """The parameters under the names of the published checkpoints."""
        return self.layout.to_published(self.state_dict())

    @classmethod
    def from_config(cls, config: Any, *, compat: str | None = None, **overrides: Any) -> Self:
        """A network with random weights from a config.json's content or a Config, with some fields changed."""
        if isinstance(config, cls.Config):
            return cls(config, compat=compat, **overrides)
        if not isinstance(config, Mapping):
            raise ValueError(f"config must be a dict or a {cls.Config.__name__}, not a {type(config).__name__}")
        published = config.get("_class_name") or (config.get("architectures") or [cls.__name__])[0]
        if published != cls.__name__:
            raise ValueError(f"the config is that of a {published}, not of a {cls.__name__}")
        network = cls(**{**config, **overrides})
        network.explicit = frozenset(overrides)
        return network.set_compat(compat)

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
        compat: str | None = None,
        **config_overrides: Any,
    ) -> Self:
        """The network of a local folder or a hub id, ready to run (`eval`).

        variant: "fp16" reads the files with that infix. torch_dtype or dtype: what the weights are cast to, float32 if
        not given; where the file has it already they stay memory-mapped. compat: as in `set_compat`. Other keywords
        change fields of the config.
        A file in place of the folder is read as by `from_single_file`, and so is a folder of ModelScope's files.
        Raises FileNotFoundError on what is missing, ValueError on weights that do not fit, TypeError on an unknown
        argument, in one line each.
        """
        cls._check_fields("from_pretrained", config_overrides)
        dtype = pick_dtype(torch_dtype, dtype)
        if subfolder is None and is_original(path_or_id):
            if variant is not None:
                raise ValueError(f"{path_or_id} is an original: it has no variant {variant!r}")
            return cls.from_single_file(path_or_id, dtype=dtype, compat=compat, **config_overrides)
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
        files = [folder / name for name in names if name != "config.json"]
        config = cls.config_of(parse_json(folder / "config.json"), (open_weights(path) for path in files))
        try:
            with torch.device("meta"), Weightless():
                model = cls.from_config(config, compat=compat, **config_overrides)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        fill(model, files, dtype)
        return model.eval()

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        ema: bool = False,
        config: str | Path | Mapping[str, Any] | None = None,
        compat: str | None = None,
        **config_overrides: Any,
    ) -> Self:
        """The network out of a `.safetensors`, `.ckpt`, `.pth` or `.bin` file in any published layout.

        What the shapes do not say (heads, groups) is as in the published model, or as `config` has it: a config.json,
        its content, or a folder or hub id that has one; keywords change fields of it.
        ema: take the moving average of the UNet, where the file has one. Nothing is written, and what has the dtype
        already stays memory-mapped. Errors as of `from_pretrained`.
        """
        from minit2v_convert.convert import components

        cls._check_fields("from_single_file", config_overrides)
        dtype = pick_dtype(torch_dtype, dtype)
        path = Path(path).expanduser()
        found = components(path, ema)
        name, part = next(((n, p) for n, p in found.items() if p.cls == cls.__name__), ("", None))
        if part is None:
            there = ", ".join(part.cls or name for name, part in found.items())
            raise ValueError(f"{path} is {next(iter(found.values())).title}: in it {there}, no {cls.__name__}")
        if config is not None:
            part = part.configured(*find_config(config, name))
        return cls.from_component(part, str(path), dtype, compat, config_overrides)

    @classmethod
    def from_component(
        cls, part: Any, label: str, dtype: torch.dtype, compat: str | None, overrides: Mapping[str, Any]
    ) -> Self:
        """The network of a part of a file (`minit2v_convert.convert.components`); label: the file's name."""
        from minit2v_convert.convert import UNSAID

        config = cls.config_of(dict(part.config), [part.tensors()])
        try:
            with torch.device("meta"), Weightless():
                model = cls.from_config(config, compat=compat, **overrides)
        except ValueError as error:
            hint = f"; {UNSAID}, or the fields" if part.guessed else ""
            raise ValueError(f"{label}: {error}{hint}") from None
        fill_from(model, label, part.tensors, dtype)
        return model.eval()

    @classmethod
    def _check_fields(cls, method: str, given: Iterable[str]) -> None:
        fields = [f.name for f in dataclass_fields(cls.Config)] + [*cls.Config.FIXED]
        for name in given:
            if name not in fields:
                known = [*inspect.signature(getattr(cls, method)).parameters, *fields]
                raise TypeError(f"{cls.__name__}.{method}() has no argument {name!r}{nearest(name, known)}")

    @classmethod
    def config_of(cls, config: dict[str, Any], states: Iterable[Mapping[str, Tensor]]) -> dict[str, Any]:
        """The content of config.json, put right where the weights, of one file after the other, say otherwise."""
        return config

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
