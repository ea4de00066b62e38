"""IP-Adapters (Ye et al. 2023, arXiv:2308.06721): reads their files, and puts them into a UNet (docs/adapters.md).

    adapter = read(source, unet)            recognises and checks the file; changes nothing yet
    install(unet, [adapter, ...])           makes every attention to the text an ImageAttention
    set_scales(unet, [0.7, ...])
    remove(unet)                            restores the UNet exactly

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

PUBLISHED = "h94/IP-Adapter"  # the repository with the adapters and their image encoders
# Width of the image embeddings -> the folder of the image encoder: ViT-H and ViT-bigG.
ENCODERS = {1024: "models/image_encoder", 1280: "sdxl_models/image_encoder"}
FAMILIES = {1024: " (Stable Diffusion 2's)", 2048: " (Stable Diffusion XL's)"}
FACE_ID = "it is an IP-Adapter FaceID, which reads face vectors of insightface; only adapters for images are supported"


class KeysValues(nn.Module):
    """The projections that one attention gets."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.to_k_ip, self.to_v_ip = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner, bias=False)


class IPAdapter(nn.Module):
    """An adapter with the names of its file: image_proj, and ip_adapter.1, ip_adapter.3, ip_adapter.5, ..."""

    def __init__(self, image_proj: nn.Module, dim: int, widths: Sequence[int]):
        super().__init__()
        self.image_proj = image_proj
        # The reference numbers all attentions. Self-attentions have the even numbers.
        self.ip_adapter = nn.ModuleDict({str(2 * k + 1): KeysValues(dim, width) for k, width in enumerate(widths)})


AS_IT_IS = Layout(rules=[("{*}", "{*}")])


# Files --------------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """The place of an adapter: its name for messages, its tensors, and its folder (root, subfolder)."""

    label: str
    open: Callable[[], dict[str, Tensor]]
    beside: tuple[str | Path, str] | None


def find(what: Any, subfolder: str | None, weight_name: str | None, **where: Any) -> Source:
    """Find an adapter.

    what: a file, a folder, a hub id, "owner/name/file" on the hub, a URL, or the tensors as a dictionary. where: as in
    `hub.find_folder`. Raises FileNotFoundError if there is no such file, TypeError or ValueError on wrong arguments.
    """
    if isinstance(what, Mapping):
        try:
            tensors = unwrap(what).tensors
        except ValueError as error:
            raise ValueError(f"the IP-Adapter given as a dictionary: {error}") from None
        return Source("the IP-Adapter given as a dictionary", lambda: dict(tensors), None)
    if not isinstance(what, str | Path):
        raise TypeError(f"an IP-Adapter must be a folder, file, hub id or dictionary, not a {type(what).__name__}")
    path = Path(hub.local(what, **where)).expanduser()
    if path.is_file():
        if weight_name is not None and weight_name != path.name:
            raise ValueError(f"{path} is a file: weight_name {weight_name!r} is only for a folder or hub id")
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
            there = f"choose one of {', '.join(weights)} as weight_name" if weights else "it has none"
            raise FileNotFoundError(f"single weights file: {there}")
        return weights

    folder, (name,) = hub.find_folder(what, subfolder or None, choose, **where)
    return Source(str(folder / name), lambda: open_weights(folder / name, mmap=False), (what, subfolder or ""))


def read(source: Source, unet: UNet) -> IPAdapter:
    """The adapter, in the UNet's dtype and on its device. ValueError if it is no IP-Adapter, or is for another UNet."""
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
    """The network that makes image tokens, recognised by names and shapes. ValueError if none of the three fits.

    shapes: {name in the file: shape}. dim: the width of the UNet's text embeddings.
    """

    def size(name: str, axis: int, ndim: int = 2) -> int:
        shape = shapes.get(f"image_proj.{name}")
        if shape is None or len(shape) != ndim or not all(shape):
            found = "but it is missing" if shape is None else f"not the shape {shape}"
            raise ValueError(f"'image_proj.{name}' must have {ndim} axes, {found}")
        return shape[axis]

    names = {name.removeprefix("image_proj.") for name in shapes if name.startswith("image_proj.")}
    if "proj.2.weight" in names and "norm.weight" in names or any(
        name.startswith("image_proj.perceiver_resampler.") or "_lora." in name for name in shapes
    ):  # fmt: skip
        raise ValueError(FACE_ID)
    if not names or not any(name.startswith("ip_adapter.") for name in shapes):
        first = repr(next(iter(shapes)))[:200] if shapes else "nothing"
        raise ValueError(f"it is not an IP-Adapter, because it lacks image_proj or ip_adapter; it has {len(shapes)} "
                         f"tensors, first {first}")  # fmt: skip
    width = next((s[1] for name, s in shapes.items() if name.endswith(".to_k_ip.weight") and len(s) == 2), dim)
    if width != dim:
        raise ValueError(f"it is an IP-Adapter for text embeddings of width {width}{FAMILIES.get(width, '')}, but the "
                         f"UNet needs width {dim}")  # fmt: skip
    if "latents" in names:
        layers = {name.split(".")[1] for name in names if name.startswith("layers.")}
        if len(layers) > MOST_LAYERS:
            raise ValueError(f"its resampler has {len(layers)} layers, and the limit is {MOST_LAYERS}")
        inner = size("layers.0.0.to_q.weight", 0)
        if inner % 64:
            raise ValueError(f"'image_proj.layers.0.0.to_q.weight' must have a multiple of 64 rows, not {inner}")
        return Resampler(size("proj_in.weight", 1), size("latents", 1, 3), size("latents", 2, 3), inner // 64,
                         len(layers), dim)  # fmt: skip
    if "proj.3.weight" in names:
        return FullProjection(size("proj.0.weight", 1), dim)
    if "proj.weight" in names:
        rows = size("proj.weight", 0)
        if rows % dim:
            raise ValueError(f"'image_proj.proj.weight' must have a multiple of {dim} rows, not {rows}")
        return ImageProjection(size("proj.weight", 1), rows // dim, dim)
    raise ValueError(f"it is an unknown kind of IP-Adapter: its image_proj has {', '.join(sorted(names)[:3])}, ...")


def find_encoder(source: Source, adapter: IPAdapter, folder: str, **arguments: Any) -> CLIPVisionModelWithProjection:
    """The image encoder in `folder` beside an adapter's file. If there is none, the published one from the hub.

    folder: a name is beside the file; a path with a slash begins at the root of the repository. arguments: those of
    `from_pretrained`. Raises OSError if no image encoder can be loaded.
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
        arguments["revision"] = None  # the given revision is for the adapter's repository
        return CLIPVisionModelWithProjection.from_pretrained(PUBLISHED, subfolder=part, **arguments)
    except OSError as error:
        raise OSError(f"{source.label} has no image encoder beside it, and the published one cannot be loaded: {error};"
                      " give the pipeline an image_encoder, or give image_encoder_folder=None here and "
                      "ip_adapter_image_embeds later") from error  # fmt: skip


def check_encoder(encoder: CLIPVisionModelWithProjection, projection: Any, label: str) -> None:
    """ValueError if the adapter needs vectors of another width than the encoder makes."""
    made = encoder.config.hidden_size if projection.reads_states else encoder.config.projection_dim
    if made != projection.features:
        raise ValueError(f"{label} needs image embeddings of width {projection.features}, but the image_encoder makes "
                         f"width {made}: use the image encoder of this adapter")  # fmt: skip


# In the UNet --------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """An attention to the text, and its place: down, mid or up, the block's index, and its own index in the block."""

    part: str
    block: int
    index: int
    holder: TransformerBlock


def places(unet: UNet) -> list[Place]:
    """All attentions to the text in the order of the files: down, up, and the middle last."""
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
    """The networks that make the image tokens, one for each adapter in the UNet."""
    return list(unet.image_projections or ())


def install(unet: UNet, adapters: Sequence[IPAdapter]) -> None:
    """Replace the UNet's adapters by these. They are not copied. Their scales are 1."""
    for attention in attentions(unet):
        if type(attention) not in (Attention, ImageAttention):
            raise TypeError(f"an IP-Adapter needs a UNet with Attention layers, not {type(attention).__name__}")
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
    """Set the scales of the adapters.

    scale: a number or a dictionary of blocks (`expand`) for a single adapter, or a list with one of these for each
    adapter. In the list, an adapter with masks may have a list with a number for each picture. ValueError on anything
    else; then nothing changes.
    """
    count = len(projections(unet))
    if not count:
        raise ValueError("no IP-Adapter is loaded: call load_ip_adapter first")
    given = list(scale) if isinstance(scale, list | tuple) else [scale]
    if len(given) != count:
        raise ValueError(f"{len(given)} scales for {count} IP-Adapters: give a list with one for each")
    there = places(unet)
    scales = list(zip(*(expand(one, there) for one in given), strict=True))
    for place, each in zip(there, scales, strict=True):
        place.holder.attn2.scales = each


def expand(scale: Any, there: Sequence[Place]) -> list[Scale]:
    """The scale of each attention.

    scale: a number, or {"down": x, "mid": x, "up": x}. Here x is a number, a list with a number for each attention of a
    block, or {"block_1": number or list}. Blocks are counted from 0 in the order in which they run. Attentions that the
    dictionary does not name get 0, as in diffusers.
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
                raise ValueError(f"an IP-Adapter's scale: {part!r}, block_{block} has {len(slots)} attentions, but "
                                 f"{len(each)} scales are given")  # fmt: skip
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
    """The image features of one call, for each adapter.

    features: (b i c), or CLIP's hidden states (b i l c), for i pictures. With pictures for each frame: (b f i ...). b
    is the batch of the texts; with guidance the negative ones come first. masks: as in `Prompt`.
    """

    features: list[Tensor]
    masks: list[Masks | None]

    def beside(self, unet: UNet) -> Callable[[Tensor], Prompt]:
        """A function that makes a Prompt from a text embedding (b l d). The image tokens are computed once, here."""
        tokens = []
        for projection, x in zip(projections(unet), self.features, strict=True):
            axes = x.ndim - (2 if projection.reads_states else 1)
            y = projection(x.to(unet.device, unet.dtype).flatten(0, axes - 1))
            tokens.append(y.unflatten(0, x.shape[:axes]))
        masks = [m if m is None else {p: x.to(unet.device) for p, x in m.items()} for m in self.masks]
        return lambda text: Prompt(text, tokens, masks)


def pixels_of(entry: Any, encoder: CLIPVisionModelWithProjection) -> Tensor:
    """The pixels (i g 3 s s) of an adapter's i pictures, each for g frames. g is 1 if a picture is for all frames.

    entry: a picture (`CLIPVisionModelWithProjection.pixels`), a list of pictures, or a list of lists with a picture for
    each frame. A tensor (3 s s) or (i 3 s s) has pixels that are prepared already. ValueError on anything else.
    """
    several = isinstance(entry, list | tuple) or getattr(entry, "ndim", 0) == 4
    images = [[*one] if isinstance(one, list | tuple) else [one] for one in (entry if several else [entry])]
    if not images or not all(images):
        raise ValueError("ip_adapter_image: the list has no pictures")
    frames = {len(one) for one in images} - {1}
    if len(frames) > 1:
        raise ValueError(f"ip_adapter_image: the lists have pictures for {' and for '.join(map(str, sorted(frames)))} "
                         "frames; give all the same number")
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
        raise ValueError(f"a tensor must have pixels prepared for the image encoder, floating-point (3, {s}, {s}), "
                         f"not {tuple(picture.shape)} of {picture.dtype}")  # fmt: skip
    if not torch.isfinite(picture).all():
        raise ValueError("the tensor holds NaN or infinity")
    return picture.float().cpu()


def check_embeds(embeds: Any, read: Sequence[Any], several: int, count: int) -> list[Tensor]:
    """Check image embeddings that were computed before, one entry for each adapter. ValueError if they do not fit.

    read: the adapters' projections. several: 2 with guidance, else 1. count: the number of videos.
    """
    if not isinstance(embeds, list | tuple) or len(embeds) != len(read):
        what = f"{len(embeds)} entries" if isinstance(embeds, list | tuple) else f"a {type(embeds).__name__}"
        raise ValueError(f"ip_adapter_image_embeds must be a list with a tensor for each of the {len(read)} "
                         f"IP-Adapters, not {what}")  # fmt: skip
    for x, projection in zip(embeds, read, strict=True):
        axes = 3 + projection.reads_states
        rows = {several, several * count}
        if not isinstance(x, Tensor) or x.ndim not in (axes, axes + 1) or len(x) not in rows or (
            x.shape[-1] != projection.features or not x.numel() or not x.is_floating_point()
        ):  # fmt: skip
            found = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            inner = f"pictures, {'states, ' * projection.reads_states}{projection.features}"
            n = " or ".join(map(str, sorted(rows)))
            raise ValueError(f"ip_adapter_image_embeds: each must be a floating-point tensor ({n}, {inner}) or "
                             f"({n}, frames, {inner}), not {found}")  # fmt: skip
        if not torch.isfinite(x).all():
            raise ValueError("ip_adapter_image_embeds hold NaN or infinity")
    return list(embeds)


def check_masks(masks: Any, counts: Sequence[int], unet: UNet) -> list[Tensor | None]:
    """The mask (1 i H W) of each adapter, or None. counts: the number of pictures of each adapter.

    masks: a list of tensors, one for each adapter. ValueError if they do not fit.
    """
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
                what = "no masks: give ip_adapter_masks" if mask is None else f"masks for {count} pictures"
                raise ValueError(f"IP-Adapter {n} has a scale for each of {len(scale)} pictures, but {what}")
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
    """Resize a mask (1 i H W) to the grid of each level of the UNet: {number of pixels: mask (i, pixels)}.

    height, width: those of the latents. published: compute the grid as diffusers does, from the mask's aspect ratio.
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
    """Makes masks from images. An IP-Adapter's picture has an effect where its mask is white."""

    def preprocess(self, image: Any, height: int | None = None, width: int | None = None) -> Tensor:
        """A tensor (n 1 height width) of zeros and ones in float32, from n images.

        image: a PIL image, an array (h w) of uint8, or a list of these. height, width: pixels of the mask (default:
        those of the first image). Both are rounded down to multiples of 8. Raises ValueError on anything else.
        """
        images, masks = list(image) if isinstance(image, list | tuple) else [image], []
        for one in images:
            if isinstance(one, np.ndarray) and one.ndim == 2 and one.dtype == np.uint8:
                one = Image.fromarray(one)
            if not isinstance(one, Image.Image):
                raise ValueError(f"a mask must be a PIL image or an array (h w) of uint8, not a {type(one).__name__}")
            if not masks:  # all get the first one's size
                w, h = (width or one.width) // 8 * 8, (height or one.height) // 8 * 8
            if w < 8 or h < 8:
                raise ValueError(f"a mask must be at least 8 pixels wide and high, not {w}x{h}")
            grey = np.array(one.resize((w, h), Image.Resampling.LANCZOS).convert("L"))
            masks.append((torch.from_numpy(grey).float() / 255 >= 0.5).float()[None])
        if not masks:
            raise ValueError("the list of masks is empty")
        return torch.stack(masks)
