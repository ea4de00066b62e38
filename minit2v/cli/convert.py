"""`minit2v convert`: from one layout to another."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from minit2v_convert.convert import LAYOUTS, Conversion, convert
from minit2v_convert.folders import CONFIG, INDEX
from minit2v_convert.stream import parse_json, size_of

from ..files import embedded, hub
from ..files.config import make_config, one_dtype
from ..models.clip import CLIPTextModel
from ..models.unet2d import UNet2DConditionModel
from ..models.unet3d import UNet3DConditionModel
from ..models.unet_motion import MotionAdapter, UNetMotionModel
from ..models.vae import AutoencoderKL
from .messages import Progress, tell

TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def run(args: argparse.Namespace) -> int:
    """The exit code; an error is raised."""
    dtype = one_dtype(args.dtype) if "dtype" in args else None
    tokenizer = _tokenizer(args.tokenizer) if "tokenizer" in args else None
    config = _config(args.config) if "config" in args else None
    src, dst = _here(args.src), Path(args.dst).expanduser()
    with tqdm(unit="B", unit_scale=True, dynamic_ncols=True, disable=args.dry_run, file=Progress()) as bar:

        def show(file: str, n: int, total: int) -> None:
            bar.total = total
            bar.set_description(file, refresh=False)
            bar.update(n)

        work = convert(src, dst, getattr(args, "to", LAYOUTS[0]), dtype, args.dry_run, ema=args.ema,
                       tokenizer=tokenizer, config=config, variant=getattr(args, "variant", None),
                       safe_serialization=not args.bin, progress=show, check=_check)
    tell(*_lines(work, args.dst, args.dry_run))
    return 0


def _check(cls: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError if the network of this class cannot be made from the config."""
    for network in (UNet2DConditionModel, UNet3DConditionModel, UNetMotionModel, MotionAdapter, AutoencoderKL,
                    CLIPTextModel):  # fmt: skip
        if network.__name__ == cls:
            make_config(network.Config, config)


def _lines(work: Conversion, dst: str, dry_run: bool) -> list[str]:
    size = sum(map(size_of, work.plans.values()))
    tensors = sum(len(plan.steps) for plan in work.plans.values())
    done = f"{dst}: {tensors} tensors, {size:,} bytes" + " would be written" * dry_run
    return [*(work.lines() if dry_run else []), *work.notes, done]


def _here(path_or_id: str) -> Path:
    """The path itself, the folder of an embedded model, or a file downloaded from the hub."""
    return embedded.find(path_or_id) or Path(hub.local(path_or_id)).expanduser()


def _tokenizer(path_or_id: str) -> Path:
    """A folder with a tokenizer's files: the folder given, or the folder `tokenizer` of a model or hub id."""
    here = _here(path_or_id)
    if here.is_dir() and not (here / "model_index.json").is_file():
        return here

    def choose(names: list[str]) -> list[str]:
        if found := [n for n in names if n in TOKENIZER]:
            return found
        raise FileNotFoundError("tokenizer's files")

    return hub.find_folder(here if here.is_dir() else path_or_id, "tokenizer", choose)[0]


def _config(path_or_id: str) -> Path:
    """The folder or file given, or a folder with the config files of a hub id."""
    here = _here(path_or_id)
    if here.exists():
        return here
    root, names = hub.find_folder(path_or_id, None, lambda names: [n for n in names if n in (CONFIG, INDEX)])
    if INDEX in names:
        index = parse_json(root / INDEX)
        for part in ("unet", "vae", "text_encoder", "motion_adapter", "scheduler", "tokenizer"):
            if isinstance(index.get(part), list) and index[part][-1]:
                hub.find_folder(path_or_id, part)
    return root
