"""IP-Adapters: out of their files, into the attentions of a UNet, and out again (docs/adapters.md).

    adapter = read(source, unet)            known by its content, checked, nothing changed yet
    install(unet, [adapter, ...])           each attention to the text becomes an ImageAttention
    set_scales(unet, [0.7, ...])
    remove(unet)                            as before, to the bit

The networks are in minit2v/models/image_prompt.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minit2v_convert.containers import unwrap
from minit2v_convert.folders import WEIGHTS
from minit2v_convert.rename import Layout, nearest

from ..files import hub
from ..files.config import MOST_LAYERS
from ..files.weights import Weightless, fill_from, open_weights
from ..models.clip_vision import CLIPVisionModelWithProjection
from ..models.image_prompt import FullProjection, ImageAttention, ImageProjection, Masks, Prompt, Resampler, Scale
from ..models.layers import Attention, TransformerBlock
from ..models.unet import Level, UNet

PUBLISHED = "h94/IP-Adapter"  # where the adapters and their image encoders are
# By the width of the vectors of whole pictures that an adapter reads: ViT-H's and ViT-bigG's.
ENCODERS = {1024: "models/image_encoder", 1280: "sdxl_models/image_encoder"}
FAMILIES = {1024: " (Stable Diffusion 2's)", 2048: " (Stable Diffusion XL's)"}
FACE_ID = "an IP-Adapter FaceID, which reads insightface's vectors of faces: only adapters that read pictures are here"


class KeysValues(nn.Module):
    """What one attention gets."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.to_k_ip, self.to_v_ip = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner, bias=False)


class IPAdapter(nn.Module):
    """An adapter as its file has it, under the file's names: image_proj, and ip_adapter's 1, 3, 5, ..."""

    def __init__(self, image_proj: nn.Module, dim: int, widths: Sequence[int]):
        super().__init__()
        self.image_proj = image_proj
        # The reference numbers all attentions, and those to the image itself have the even numbers.
        self.ip_adapter = nn.ModuleDict({str(2 * k + 1): KeysValues(dim, width) for k, width in enumerate(widths)})


AS_IT_IS = Layout(rules=[("{*}", "{*}")])


# Files --------------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where an adapter is: what messages call it, its tensors, and the folder (root, subfolder) that it lies in."""

    label: str
    open: Callable[[], dict[str, Tensor]]
    beside: tuple[str | Path, str] | None


def find(what: Any, subfolder: str | None, weight_name: str | None, **where: Any) -> Source:
    """An adapter's file in a folder or hub repository, a file, owner/name/file on the hub, the address of one, or its
    content (a dictionary).

    `where` as of `hub.find_folder`. FileNotFoundError where it is not there, ValueError where that is not clear.
    """
    if isinstance(what, Mapping):
        try:
            tensors = unwrap(what).tensors
        except ValueError as error:
            raise ValueError(f"the IP-Adapter given as a dictionary: {error}") from None
        return Source("the IP-Adapter given as a dictionary", lambda: dict(tensors), None)
    if not isinstance(what, str | Path):
        raise TypeError(f"an IP-Adapter is a folder, a file, a hub id or a dictionary, not a {type(what).__name__}")
    path = Path(hub.local(what, **where)).expanduser()
    if path.is_file():
        if weight_name is not None and weight_name != path.name:
            raise ValueError(f"{path} is a file: weight_name {weight_name!r} is one of a folder or hub id")
        return Source(str(path), lambda: open_weights(path, mmap=False), (path.parent, ""))
    parts = str(what).split("/")
    if weight_name is None and len(parts) > 2 and parts[-1].endswith(WEIGHTS) and not path.parent.is_dir():
        what, weight_name = "/".join(parts[:2]), "/".join(parts[2:])  # owner/name/file
    if weight_name is not None and "/" in weight_name:
        inner, weight_name = weight_name.rsplit("/", 1)
        subfolder = f"{subfolder}/{inner}" if subfolder else inner

    def choose(names: Sequence[str]) -> Sequence[str]:
        if weight_name is not None:
            if weight_name not in names:
                raise FileNotFoundError(f"{weight_name}{nearest(weight_name, names)}; the files there: "
                                        f"{', '.join(names) or 'none'}")  # fmt: skip
            return [weight_name]
        weights = [name for name in names if name.endswith(WEIGHTS)]
        if len(weights) != 1:
            there = f"of {', '.join(weights)} say which as weight_name" if weights else "no file of weights is there"
            raise FileNotFoundError(f"one file of weights alone: {there}")
        return weights

    folder, (name,) = hub.find_folder(what, subfolder or None, choose, **where)
    return Source(str(folder / name), lambda: open_weights(folder / name, mmap=False), (what, subfolder or ""))


def read(source: Source, unet: UNet) -> IPAdapter:
    """The adapter, in the UNet's dtype and on its device. ValueError in one line where it is none, or not for it."""
    tensors = source.open()
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    dim = unet.config.cross_attention_dim
    try:
        with torch.device("meta"), Weightless():
            adapter = IPAdapter(projection_of(shapes, dim), dim, [a.to_k.out_features for a in attentions(unet)])
    except ValueError as error:
        raise ValueError(f"{source.label}: {error}") from None
    fill_from(adapter, AS_IT_IS, source.label, lambda: tensors, unet.dtype)
    for name, p in adapter.named_parameters():
        if not torch.isfinite(p).all():
            raise ValueError(f"{source.label}: {name!r} holds NaN or infinity")
    return adapter.to(unet.device).requires_grad_(False).eval()


def projection_of(shapes: Mapping[str, tuple[int, ...]], dim: int) -> nn.Module:
    """The network that makes tokens, known by its names and shapes. ValueError where it is none of the three."""

    def size(name: str, axis: int, ndim: int = 2) -> int:
        shape = shapes.get(f"image_proj.{name}")
        if shape is None or len(shape) != ndim or not all(shape):
            found = "it is not there" if shape is None else f"not {shape}"
            raise ValueError(f"'image_proj.{name}' must have {ndim} axes, {found}")
        return shape[axis]

    names = {name.removeprefix("image_proj.") for name in shapes if name.startswith("image_proj.")}
    if "proj.2.weight" in names and "norm.weight" in names or any(
        name.startswith("image_proj.perceiver_resampler.") or "_lora." in name for name in shapes
    ):  # fmt: skip
        raise ValueError(FACE_ID)
    if not names or not any(name.startswith("ip_adapter.") for name in shapes):
        first = repr(next(iter(shapes)))[:200] if shapes else "nothing"
        raise ValueError(f"no IP-Adapter, which has image_proj and ip_adapter; in it are {len(shapes)} tensors, "
                         f"{first} first")  # fmt: skip
    width = next((s[1] for name, s in shapes.items() if name.endswith(".to_k_ip.weight") and len(s) == 2), dim)
    if width != dim:
        raise ValueError(f"an IP-Adapter for texts of width {width}{FAMILIES.get(width, '')}, and the UNet's are of "
                         f"width {dim}")  # fmt: skip
    if "latents" in names:
        layers = {name.split(".")[1] for name in names if name.startswith("layers.")}
        if len(layers) > MOST_LAYERS:
            raise ValueError(f"{len(layers)} layers of a resampler are more than {MOST_LAYERS}")
        inner = size("layers.0.0.to_q.weight", 0)
        if inner % 64:
            raise ValueError(f"'image_proj.layers.0.0.to_q.weight' must have heads of 64 rows, not {inner} rows")
        return Resampler(size("proj_in.weight", 1), size("latents", 1, 3), size("latents", 2, 3), inner // 64,
                         len(layers), dim)  # fmt: skip
    if "proj.3.weight" in names:
        return FullProjection(size("proj.0.weight", 1), dim)
    if "proj.weight" in names:
        rows = size("proj.weight", 0)
        if rows % dim:
            raise ValueError(f"'image_proj.proj.weight' must make tokens of width {dim}, not {rows} rows")
        return ImageProjection(size("proj.weight", 1), rows // dim, dim)
    raise ValueError(f"no IP-Adapter that is known: its image_proj has {', '.join(sorted(names)[:3])}, ...")


def find_encoder(source: Source, adapter: IPAdapter, folder: str, **arguments: Any) -> CLIPVisionModelWithProjection:
    """The image encoder beside an adapter's file, in `folder`; where none is there, the published one on the hub.

    folder: with a slash, below the root of the repository and not beside the file. arguments: of `from_pretrained`.
    """
    where = {k: v for k, v in arguments.items() if k != "dtype"}
    if source.beside is not None:
        root, below = source.beside
        inner = folder if "/" in folder or not below else f"{below}/{folder}"
        try:
            hub.find_folder(root, inner, lambda names: [], **where)
        except FileNotFoundError:
            if folder != "image_encoder":
                raise
        else:
            return CLIPVisionModelWithProjection.from_pretrained(root, subfolder=inner, **arguments)
    part = ENCODERS[1024]
    if not adapter.image_proj.reads_states:
        part = ENCODERS.get(adapter.image_proj.features, part)
    try:
        arguments["revision"] = None  # that of the adapter's repository
        return CLIPVisionModelWithProjection.from_pretrained(PUBLISHED, subfolder=part, **arguments)
    except OSError as error:
        raise OSError(f"{source.label} has no image encoder beside it, and the published one cannot be had: {error}; "
                      "give the pipeline its image_encoder, or image_encoder_folder=None and later "
                      "ip_adapter_image_embeds") from error  # fmt: skip


def check_encoder(encoder: CLIPVisionModelWithProjection, projection: Any, label: str) -> None:
    """ValueError where the adapter reads other vectors than the encoder makes."""
    made = encoder.config.hidden_size if projection.reads_states else encoder.config.projection_dim
    if made != projection.features:
        raise ValueError(f"{label} reads vectors of width {projection.features}, and the image_encoder makes them "
                         f"{made} wide: it belongs to another one")  # fmt: skip


# In the UNet --------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """An attention to the text, and where it is: down, mid or up, the number of the block, and of itself in that."""

    part: str
    block: int
    index: int
    holder: TransformerBlock


def places(unet: UNet) -> list[Place]:
    """All attentions to the text in the published order: down, up, and the middle last."""
    found = []
    levels = [("down", i, level.blocks) for i, level in enumerate(unet.down) if isinstance(level, Level)]
    levels += [("up", i, level.blocks) for i, level in enumerate(unet.up) if isinstance(level, Level)]
    for part, i, blocks in [*levels, ("mid", 0, unet.mid)]:
        holders = [block.spatial.block for block in blocks if getattr(block, "attention", False)]
        found += [Place(part, i, j, holder) for j, holder in enumerate(holders)]
    return found


def attentions(unet: UNet) -> list[Any]:
    return [place.holder.attn2 for place in places(unet)]


def projections(unet: UNet) -> list[Any]:
    """What makes the tokens of each adapter that is in the UNet."""
    return list(unet.image_projections or ())


def install(unet: UNet, adapters: Sequence[IPAdapter]) -> None:
    """Put adapters into the UNet, in the place of those that are there. No copy. Their scales are 1."""
    for attention in attentions(unet):
        if type(attention) not in (Attention, ImageAttention):
            raise TypeError(f"an IP-Adapter goes into an Attention, and the UNet has a {type(attention).__name__}")
    remove(unet)
    for k, place in enumerate(places(unet)):
        parts: list[Any] = [adapter.ip_adapter[str(2 * k + 1)] for adapter in adapters]
        place.holder.attn2 = ImageAttention(place.holder.attn2, [p.to_k_ip for p in parts], [p.to_v_ip for p in parts])
    unet.image_projections = nn.ModuleList(adapter.image_proj for adapter in adapters)


def remove(unet: UNet) -> None:
    """Take all adapters out of the UNet."""
    for place in places(unet):
        if isinstance(place.holder.attn2, ImageAttention):
            place.holder.attn2 = place.holder.attn2.plain()
    unet.image_projections = None


def set_scales(unet: UNet, scale: Any) -> None:
    """A number for one adapter, or a dictionary of blocks (`expand`); or a list with one of these for each, or in it a
    list with a number for each picture that has a mask. ValueError on anything else, and then nothing changes."""
    count = len(projections(unet))
    if not count:
        raise ValueError("there is no IP-Adapter whose scale could be set: load_ip_adapter first")
    given = list(scale) if isinstance(scale, list | tuple) else [scale]
    if len(given) != count:
        raise ValueError(f"{len(given)} scales for {count} IP-Adapters: give a list with one for each")
    there = places(unet)
    scales = list(zip(*(expand(one, there) for one in given), strict=True))
    for place, each in zip(there, scales, strict=True):
        place.holder.attn2.scales = each


def expand(scale: Any, there: Sequence[Place]) -> list[Scale]:
    """The scale of each attention: what a dictionary leaves out is 0, as in diffusers.

    {"down": x, "mid": x, "up": x}: x a number, or a list with one for each attention of a block, or
    {"block_1": such a number or list}, the blocks counted from 0 as they are passed.
    """
    if not isinstance(scale, Mapping):
        return [_leaf(scale)] * len(there)
    out: list[Scale] = [0.0] * len(there)
    for part, value in scale.items():
        blocks = sorted({place.block for place in there if place.part == part})
        if part not in ("down", "mid", "up") or not blocks:
            known = sorted({place.part for place in there})
            raise ValueError(f"an IP-Adapter's scale: the UNet has {', '.join(known)}, not {part!r}"
                             f"{nearest(part, known)}")  # fmt: skip
        names = {f"block_{i}": i for i in blocks} if part != "mid" else {}
        if isinstance(value, Mapping):
            for name in value:
                if name not in names:
                    raise ValueError(f"an IP-Adapter's scale: {part!r} has {', '.join(names) or 'no blocks'} with "
                                     f"attention to the text, not {name!r}{nearest(name, list(names))}")  # fmt: skip
            of_block = {names[name]: inner for name, inner in value.items()}
        else:
            of_block = dict.fromkeys(blocks, value)
        for block, inner in of_block.items():
            slots = [n for n, place in enumerate(there) if (place.part, place.block) == (part, block)]
            each = list(inner) if isinstance(inner, list | tuple) else [inner]
            if len(each) not in (1, len(slots)):
                raise ValueError(f"an IP-Adapter's scale: {part!r}, block_{block} has {len(slots)} attentions, not "
                                 f"{len(each)}")  # fmt: skip
            for n, one in zip(slots, each * (len(slots) // len(each)), strict=True):
                out[n] = _leaf(one)
    return out


def _leaf(value: Any) -> Scale:
    if isinstance(value, list | tuple) and value:
        return tuple(_number(x) for x in value)
    return _number(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"an IP-Adapter's scale must be a finite number, not {value!r:.80}")
    return float(value)


# Pictures -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """What a call shows the UNet beside its texts.

    features, for each adapter: (b i c), or CLIP's states (b i l c); or (b f i ...) with others for each frame. b is
    that of a prediction's texts, with guidance the negative ones first. masks: as in `Prompt`.
    """

    features: list[Tensor]
    masks: list[Masks | None]

    def beside(self, unet: UNet) -> Callable[[Tensor], Prompt]:
        """What makes a Prompt of a text (b l d): the tokens are made now, once."""
        tokens = []
        for projection, x in zip(projections(unet), self.features, strict=True):
            axes = x.ndim - (2 if projection.reads_states else 1)
            y = projection(x.to(unet.device, unet.dtype).flatten(0, axes - 1))
            tokens.append(y.unflatten(0, x.shape[:axes]))
        masks = [m if m is None else {p: x.to(unet.device) for p, x in m.items()} for m in self.masks]
        return lambda text: Prompt(text, tokens, masks)


def pixels_of(entry: Any, encoder: CLIPVisionModelWithProjection) -> Tensor:
    """An adapter's pictures -> (i g 3 s s): i pictures, each of g frames, which is 1 where none has one for each.

    entry: a picture (`CLIPVisionModelWithProjection.pixels`), a list of some, or in that list lists with a picture for
    each frame. A tensor (3 s s) or (i 3 s s) is pixels that are prepared already. ValueError on anything else.
    """
    several = isinstance(entry, list | tuple) or getattr(entry, "ndim", 0) == 4
    images = [[*one] if isinstance(one, list | tuple) else [one] for one in (entry if several else [entry])]
    if not images or not all(images):
        raise ValueError("ip_adapter_image: a list without pictures")
    frames = {len(one) for one in images} - {1}
    if len(frames) > 1:
        raise ValueError(f"ip_adapter_image: pictures for {' and for '.join(map(str, sorted(frames)))} frames")
    try:
        stacks = [torch.stack([_pixels(picture, encoder) for picture in one]) for one in images]
    except ValueError as error:
        raise ValueError(f"ip_adapter_image: {error}") from None
    return torch.stack([x.expand(max(frames, default=1), -1, -1, -1) for x in stacks])


def _pixels(picture: Any, encoder: CLIPVisionModelWithProjection) -> Tensor:
    if not isinstance(picture, Tensor):
        return encoder.pixels(picture)
    s = encoder.config.image_size
    if tuple(picture.shape) != (3, s, s) or not picture.is_floating_point():
        raise ValueError(f"a tensor is pixels that are prepared for the image encoder, floating-point (3, {s}, {s}), "
                         f"not {tuple(picture.shape)} of {picture.dtype}")  # fmt: skip
    if not torch.isfinite(picture).all():
        raise ValueError("a tensor holds NaN or infinity")
    return picture.float().cpu()


def check_embeds(embeds: Any, read: Sequence[Any], several: int, count: int) -> list[Tensor]:
    """What was made of pictures before, an entry for each adapter. ValueError where it is not that.

    several: 2 with guidance, else 1; count: of the videos.
    """
    if not isinstance(embeds, list | tuple) or len(embeds) != len(read):
        what = f"{len(embeds)} entries" if isinstance(embeds, list | tuple) else f"a {type(embeds).__name__}"
        raise ValueError(f"ip_adapter_image_embeds must be a list of a tensor for each of the {len(read)} IP-Adapters, "
                         f"not {what}")  # fmt: skip
    for x, projection in zip(embeds, read, strict=True):
        axes = 3 + projection.reads_states
        rows = {several, several * count}
        if not isinstance(x, Tensor) or x.ndim not in (axes, axes + 1) or len(x) not in rows or (
            x.shape[-1] != projection.features or not x.numel() or not x.is_floating_point()
        ):  # fmt: skip
            found = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            inner = f"pictures, {'states, ' * projection.reads_states}{projection.features}"
            n = " or ".join(map(str, sorted(rows)))
            raise ValueError(f"ip_adapter_image_embeds: each must be a floating-point tensor, here ({n}, {inner}) or "
                             f"({n}, frames, {inner}), not {found}")  # fmt: skip
        if not torch.isfinite(x).all():
            raise ValueError("ip_adapter_image_embeds hold NaN or infinity")
    return list(embeds)


def check_masks(masks: Any, counts: Sequence[int], unet: UNet) -> list[Tensor | None]:
    """For each adapter its mask (1 i H W), or None. counts: the pictures of each. ValueError on anything else."""
    if masks is None:
        given: list[Any] = [None] * len(counts)
    elif isinstance(masks, Tensor) and masks.ndim == 4:  # diffusers' older form: (adapters 1 H W)
        given = [m[None] for m in masks]
    elif isinstance(masks, list | tuple):
        given = list(masks)
    else:
        raise ValueError(f"ip_adapter_masks must be a list of tensors, one for each IP-Adapter, not a "
                         f"{type(masks).__name__}")  # fmt: skip
    if len(given) != len(counts):
        raise ValueError(f"{len(given)} ip_adapter_masks for {len(counts)} IP-Adapters: give one for each")
    scales = list(zip(*(a.scales for a in attentions(unet)), strict=True))
    for n, (mask, count) in enumerate(zip(given, counts, strict=True)):
        for scale in scales[n]:
            if isinstance(scale, tuple) and (mask is None or len(scale) != count):
                what = "without masks for them" if mask is None else f"and {count} pictures with masks"
                raise ValueError(f"IP-Adapter {n} has a scale for each of {len(scale)} pictures, {what}")
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.ndim != 4 or len(mask) != 1 or not mask.numel():
            found = tuple(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise ValueError(f"ip_adapter_masks: each must be a tensor (1, pictures, height, width), not {found}; "
                             "IPAdapterMaskProcessor makes them")  # fmt: skip
        if mask.shape[1] != count:
            raise ValueError(f"ip_adapter_masks: {mask.shape[1]} masks for the {count} pictures of IP-Adapter {n}")
        if not torch.isfinite(mask.float()).all():
            raise ValueError("ip_adapter_masks hold NaN or infinity")
    return given


def fit_mask(mask: Tensor, height: int, width: int, unet: UNet, published: bool = False) -> Masks:
    """mask (1 i H W) for the grid of each level of the U, which begins with latents of this height and width.

    published: as diffusers does it, for what it takes for the grid: from the mask's own ratio of sides.
    """
    out: Masks = {}
    for _ in unet.down:
        p = height * width
        if published:
            out[p] = _published_mask(mask.float(), p)
        else:
            out[p] = F.interpolate(mask.float(), (height, width), mode="bicubic")[0].flatten(1)
        height, width = (height + 1) // 2, (width + 1) // 2
    return out


def _published_mask(mask: Tensor, p: int) -> Tensor:
    ratio = mask.shape[3] / mask.shape[2]
    h = int(math.sqrt(p / ratio))
    h += int(p % max(h, 1) != 0) or int(h == 0)
    flat = F.interpolate(mask, (h, max(1, p // h)), mode="bicubic")[0].flatten(1)
    return F.pad(flat, (0, p - flat.shape[1])) if flat.shape[1] < p else flat[:, :p]


class IPAdapterMaskProcessor:
    """Makes masks of pictures: white is where an IP-Adapter's picture is to be seen."""

    def preprocess(self, image: Any, height: int | None = None, width: int | None = None) -> Tensor:
        """A picture, or a list of some -> (n 1 height width) of zeros and ones, in float32.

        Resized to height and width, or to its own, less what is over multiples of 8. ValueError: it is not a picture.
        """
        images, masks = list(image) if isinstance(image, list | tuple) else [image], []
        for one in images:
            if isinstance(one, np.ndarray) and one.ndim == 2 and one.dtype == np.uint8:
                one = Image.fromarray(one)
            if not isinstance(one, Image.Image):
                raise ValueError(f"a mask must be a PIL image or an array (h w) of bytes, not a {type(one).__name__}")
            if not masks:  # all are of the first one's size
                w, h = (width or one.width) // 8 * 8, (height or one.height) // 8 * 8
            if w < 8 or h < 8:
                raise ValueError(f"a mask must have 8 pixels or more each way, not {w}x{h}")
            grey = np.array(one.resize((w, h), Image.Resampling.LANCZOS).convert("L"))
            masks.append((torch.from_numpy(grey).float() / 255 >= 0.5).float()[None])
        if not masks:
            raise ValueError("a list without masks")
        return torch.stack(masks)
