"""Finds files in a local folder, in an embedded model, or in a repository on the Hugging Face hub.

Every error is one line that names the file. ValueError: bad content. FileNotFoundError: a missing file. OSError: a
file that cannot be written or downloaded.
"""

import glob
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from minit2v_convert.rename import nearest
from minit2v_convert.stream import first_line, json_text, parse_json, replacing

from . import embedded

HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
DIFFUSERS_VERSION = "0.30.0"  # minit2v writes the file layout of this version
Choose = Callable[[Sequence[str]], Sequence[str]]  # names of the files in a folder -> names of the needed files


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
    """A local folder with the files that `choose` picks, and the names of these files.

    path_or_id: a local folder, else the name of an embedded model (`shapes`), else a hub id ("owner/name"). From the
    hub only the chosen files are downloaded. choose: the default picks the small files (.json, .txt); it raises
    FileNotFoundError if a file that it needs is missing. The other arguments are those of huggingface_hub.

    Raises FileNotFoundError if the folder, repository or file does not exist, OSError if a download fails, ValueError
    if `path_or_id` is a file.
    """
    choose = choose or (lambda names: [n for n in names if n.endswith((".json", ".txt"))])
    repo, here = str(path_or_id), embedded.find(path_or_id) or Path(path_or_id).expanduser()
    label = f"{repo.rstrip('/')}/{subfolder}" if subfolder else repo
    if here.is_dir():
        return _choose_in(here, subfolder, choose, label)
    if here.is_file():
        raise ValueError(f"{repo} is a file: from_pretrained reads a folder or a hub id")
    check_hub_id(repo)

    import huggingface_hub as hf
    from huggingface_hub import constants  # `hf.constants` exists only after this import

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
            raise FileNotFoundError(f"{label} is not in the cache, and cannot be downloaded: {offline}")
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
        raise OSError(f"downloading {label} failed: {first_line(error)}") from error
    if absent := [n for n in wanted if not (root / prefix / n).is_file()]:  # the connection broke
        raise OSError(f"downloading {label} failed: {', '.join(absent)} did not arrive")
    return root / prefix, wanted


def local(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    force_download: bool = False,
) -> str | Path:
    """Resolve a URL on huggingface.co; anything else is returned unchanged.

    The URL of a file gives the path of the downloaded file. The URL of a repository gives its id. revision: used only
    for a repository, because the URL of a file contains one. Raises ValueError on any other URL, FileNotFoundError if
    the hub has no such file, OSError if the download fails.
    """
    url = re.fullmatch(r"(?s)([A-Za-z][\w+.-]+):/+([^/]*)/?([^?#]*).*", str(path_or_id))  # a Path has one slash
    if url is None or os.path.exists(path_or_id):
        return path_or_id
    import huggingface_hub as hf
    from huggingface_hub import constants, errors

    where = [unquote(part) for part in url[3].strip("/").split("/")]
    is_web = url[1].lower() in ("http", "https")
    known = is_web and url[2].lower() in (*HOSTS, constants.ENDPOINT.split("//")[-1]) and not {"", ".", ".."} & {*where}
    if known and (len(where) == 2 or where[2:] == ["tree", revision or "main"]):
        return "/".join(where[:2])
    if not known or len(where) < 5 or where[2] not in ("blob", "resolve"):
        raise ValueError(f"{path_or_id}: only files on huggingface.co are downloaded, such as "
                         "https://huggingface.co/owner/name/blob/main/file; download others yourself")  # fmt: skip
    repo, revision, name = "/".join(where[:2]), where[3], "/".join(where[4:])
    try:
        return Path(hf.hf_hub_download(repo, name, revision=revision, cache_dir=cache_dir, token=token,
                                       local_files_only=local_files_only, force_download=force_download))
    except Exception as error:
        _raise_refusal(error, repo, revision)
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            raise FileNotFoundError(f"{repo} has no {name} in revision {revision!r}") from None
        raise OSError(f"downloading {name} of {repo} failed: {first_line(error)}") from error


def local_file(path: str | Path, **where: Any) -> Path:
    """`local` for a single file. ValueError on the URL of a repository."""
    found = local(path, **where)
    if isinstance(found, str) and found != str(path):
        raise ValueError(f"{path} is a repository, not a file: use from_pretrained, or give the URL of a file")
    return Path(found).expanduser()


def check_hub_id(name: str) -> None:
    """FileNotFoundError if the name cannot be a hub id. Then it was meant as a folder or an embedded model."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        near = nearest(name, embedded.NAMES)
        if not near and "/" not in name:
            near = f"; models of this package: {', '.join(embedded.NAMES)}"
        raise FileNotFoundError(f"there is no folder {name!r}, and a hub id is 'owner/name'{near}")


def _raise_refusal(error: Exception, repo: str, revision: str | None) -> None:
    """Raise a clear error if the hub refuses. Other errors, such as those of the network, are left to the caller."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        raise OSError(f"{repo} is gated: accept its terms on its page, and log in or pass token=") from None
    if isinstance(error, errors.RepositoryNotFoundError):
        raise FileNotFoundError(
            f"there is no folder {repo!r}, and no repository of that name on the hub (a private one needs token=)"
        ) from None
    if isinstance(error, errors.RevisionNotFoundError):
        raise FileNotFoundError(f"{repo} has no revision {revision!r}") from None
    if isinstance(error, errors.HFValidationError):
        raise ValueError(f"{repo!r} is neither a folder nor a hub id: {first_line(error)}") from None


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
            raise FileNotFoundError(f"{label} is a complete pipeline: pass subfolder= for one of its parts") from None
        raise FileNotFoundError(f"{label} has no {error}") from None


def _cached_snapshot(hf: Any, repo: str, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    """The folder of this revision in the cache: <cache>/models--owner--name/snapshots/<commit>."""
    folder = Path(cache_dir or hf.constants.HF_HUB_CACHE) / ("models--" + repo.replace("/", "--"))
    ref = folder / "refs" / (revision or "main")
    snapshot = folder / "snapshots" / (ref.read_text() if ref.is_file() else revision or "main")
    return snapshot if snapshot.is_dir() else None


def need(*wanted: str) -> Choose:
    """A `choose` that needs exactly these files."""

    def choose(names: Sequence[str]) -> Sequence[str]:
        for name in wanted:
            if name not in names:
                raise FileNotFoundError(f"{name}; the files there: {', '.join(names) or 'none'}")
        return wanted

    return choose


def choose_weights(weights_name: str, variant: str | None, use_safetensors: bool | None) -> Choose:
    """A `choose` for config.json and the weights. It prefers `.safetensors` to `.bin`, and one file to shards."""
    v = f".{variant}" if variant else ""
    kinds = [(weights_name, "safetensors"), (weights_name if weights_name != "model" else "pytorch_model", "bin")]
    if use_safetensors is not None:
        kinds = kinds[:1] if use_safetensors else kinds[1:]

    def choose(names: Sequence[str]) -> Sequence[str]:
        config = need("config.json")(names)
        for name, kind in kinds:
            if f"{name}{v}.{kind}" in names:
                return [*config, f"{name}{v}.{kind}"]
            # The variant is before the number, and in files from before 2025 after it.
            number, v_ = r"-(\d{5})-of-(\d{5})", re.escape(v)
            shard = re.compile(rf"{re.escape(name)}(?:{v_}{number}|{number}{v_})\.{kind}")
            if shards := sorted((n, m) for n in names if (m := shard.fullmatch(n))):
                count = int(shards[0][1][2] or shards[0][1][4])
                if len(shards) != count:
                    raise FileNotFoundError(f"more than {len(shards)} of the {count} shards of {name}{v}.{kind}")
                return [*config, *(n for n, _ in shards)]
        there = [n for n in names if n.endswith((".safetensors", ".bin", ".ckpt", ".pth", ".pt", ".msgpack"))]
        wanted = " or ".join(f"{name}{v}.{kind}" for name, kind in kinds)
        raise FileNotFoundError(f"{wanted}; the weights there: {', '.join(there) or 'none'}")

    return choose


def read_json(path_or_id: str | Path, name: str, *, subfolder: str | None = None, **where: Any) -> dict[str, Any]:
    """The object in a JSON file of a folder or hub repository. where: as in `find_folder`."""
    folder, _ = find_folder(path_or_id, subfolder, need(name), **where)
    return parse_json(folder / name)


def find_config(config: str | Path | Mapping[str, Any], component: str, **where: Any) -> tuple[dict[str, Any], str]:
    """The content of a component's config.json, and its path.

    config: the folder or hub id of a pipeline or of the component, the file itself, or its content as a dictionary.
    where: as in `find_folder`. Raises FileNotFoundError if there is no such file.
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
