"""Runs a model with its weights, to measure the time of each module and to see its attention maps."""

import base64
import io
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from ..models.attention_maps import attention_maps, attentions
from .trace import Traced

STEPS, FRAMES, TOKENS, SIDE = 5, 4, 12, 16  # the most steps, frames and tokens on the page; pixels of a map's side
RUNS, PATIENCE = 3, 10.0  # timed runs after a first one; if that takes more seconds than PATIENCE, it is the only one
ROOM = 2**30  # the most bytes for the maps of one step


@dataclass(frozen=True)
class Sampled:
    """seconds: {name of the trace's node: time of one call}. maps: for page.js, see `look`."""

    seconds: dict[str, float]
    measured_on: str
    maps: dict[str, Any]


def sample(traced: Traced, pipe: Any, call: dict[str, Any], prompt: str, seed: int) -> Sampled:
    """Measure the time of each module, and make a video of the prompt to get its attention maps.

    call: arguments of the pipeline's call. The plain networks run on the pipeline's device.
    """
    return Sampled(measure(traced, pipe), device_name(pipe), look(traced, pipe, call, prompt, seed))


# ----------------------------------------------------------------------------------------------------------------- time


@torch.no_grad()
def measure(traced: Traced, pipe: Any) -> dict[str, float]:
    """The seconds of every module (the median of its runs), on inputs with the traced shapes."""
    runs: dict[str, list[float]] = {}

    def tensor(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=pipe.unet.dtype, device=pipe.unet.device)

    given = dict(traced.nodes["unet"].inputs)
    x, context, z = tensor(given["x"]), tensor(given["context"]), tensor(traced.nodes["vae"].inputs[0][1])
    time_module(runs, "unet", pipe.unet, lambda: pipe.unet(x, 500, context))
    time_module(runs, "vae", pipe.vae, lambda: pipe.vae.decode(z.to(pipe.vae.dtype)))
    if "text_encoder" in traced.networks:
        ids = torch.zeros(traced.nodes["text_encoder"].inputs[0][1], dtype=torch.int64, device=pipe.text_encoder.device)
        time_module(runs, "text_encoder", pipe.text_encoder, lambda: pipe.text_encoder(ids))
    seconds = {name: median(values) for name, values in runs.items()}
    for name, node in reversed(traced.nodes.items()):  # levels of the UNet are not called: add up their parts
        if name not in seconds:
            seconds[name] = sum(seconds.get(child.name, 0.0) for child in traced.children(node.name))
    return seconds


def time_module(runs: dict[str, list[float]], part: str, network: nn.Module, call: Callable[[], Any]) -> None:
    """Append the seconds of every module in a network to `runs`, run by run. Several calls in a run are added up."""
    began: list[float] = []
    took: dict[str, float] = {}

    def now() -> float:
        if next(network.parameters()).device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def before(module: nn.Module, args: Any) -> None:
        began.append(now())

    def after(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            took[name] = took.get(name, 0.0) + now() - began.pop()

        return note

    hooks: list[Any] = []
    try:
        for name, module in network.named_modules():
            if name:
                hooks.append(module.register_forward_pre_hook(before))
                hooks.append(module.register_forward_hook(after(f"{part}.{name}")))
        for run in range(1 + RUNS):
            took.clear()
            start = now()
            call()
            took[part] = now() - start
            if run or took[part] > PATIENCE:
                for name, value in took.items():
                    runs.setdefault(name, []).append(value)
            if took[part] > PATIENCE:
                return
    finally:
        for hook in hooks:
            hook.remove()


def device_name(pipe: Any) -> str:
    device, dtype = pipe.unet.device, str(pipe.unet.dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"on {torch.cuda.get_device_name(device)}, {dtype}"
    threads = torch.get_num_threads()
    cores = f"{threads} thread" + "s" * (threads > 1)
    return f"on a {platform.machine()} processor, {cores}, {dtype}" if device.type == "cpu" else f"on {device}, {dtype}"


# ----------------------------------------------------------------------------------------------------------------- maps


def look(traced: Traced, pipe: Any, call: dict[str, Any], prompt: str, seed: int) -> dict[str, Any]:
    """Attention maps of some steps as images, with the texts that page.js shows beside them.

    of: {attention: {kind, says, rows, columns, marks, images}}. There is an image for each step, a grid of rows and
    columns. The maps are for the prompt, not for the negative prompt, and are the mean over the heads. Spatial
    attention maps are left out if those of one step would take more than 1 GiB.
    """
    count = int(call["num_inference_steps"])
    steps = evenly(count, STEPS)
    frames = evenly(traced.video.frames, FRAMES)
    sizes = {n.output[2] * n.output[3]: n.output[2:] for n in traced.nodes.values() if len(n.output) == 4}
    tokens = words(pipe, prompt)
    of = {f"unet.{name}": kind for kind in ("spatial", "text", "frames") for name, _ in attentions(pipe.unet, [kind])}
    seen = [n.inputs[0][1] for n in traced.nodes.values() if of.get(n.name) == "spatial"]
    room = sum(4 * images * pixels**2 for images, pixels, _ in seen)
    kinds = ("spatial", "text", "frames") if room <= ROOM else ("text", "frames")
    found: dict[str, dict[str, Any]] = {}

    def reduce(pipe: Any, step: int, t: Any, tensors: Any) -> dict[str, Any]:
        for name, (map_,) in maps.items():
            full = f"unet.{name}"
            kind = of[full]
            grid, entry = GRIDS[kind](map_[len(map_) // 2 :], frames, tokens, sizes)
            found.setdefault(full, {"kind": kind, "images": [], **entry})["images"].append(png(grid))
        maps.clear()
        return {}

    generator = torch.Generator().manual_seed(seed)
    with attention_maps(pipe.unet, kinds, calls=set(steps), limit=2**62) as maps:
        video = pipe(prompt, **call, generator=generator, callback_on_step_end=reduce, output_type="np").frames[0]
    ratio = traced.video.width / traced.video.height
    shown = torch.as_tensor(video)[frames].permute(0, 3, 1, 2)
    shown = F.adaptive_avg_pool2d(shown, (min(64, shown.shape[2]), min(64, shown.shape[3])))
    order = [name for name in traced.nodes if name in found]
    return {"prompt": prompt, "count": count, "steps": [s + 1 for s in steps], "ratio": ratio,
            "video": png(rearrange(shown, "f c h w -> (f h) w c")), "of": {name: found[name] for name in order}}


def evenly(count: int, most: int) -> list[int]:
    """At most `most` numbers from 0 to count - 1, evenly spread, with the first and the last."""
    n = min(count, most)
    return sorted({round(i * (count - 1) / max(1, n - 1)) for i in range(n)})


def words(pipe: Any, prompt: str) -> list[str]:
    """The tokens of the prompt as readable words, with the start and end tokens."""
    names = [pipe.tokenizer.decode([i]) or "?" for i in pipe.tokenizer.encode(prompt)]
    return ["start", *names[1:-1], "end"][:TOKENS]


Grid = tuple[Tensor, dict[str, Any]]  # the image of all rows and columns, and their texts for page.js


def text_grid(map_: Tensor, frames: list[int], tokens: list[str], sizes: dict[int, Any]) -> Grid:
    """(1 (f p) l) -> rows are frames, columns are tokens. Each token is scaled from its minimum to its maximum."""
    count = frames[-1] + 1
    h, w = sizes[map_.shape[1] // count]
    x = rearrange(map_[0, :, : len(tokens)], "(f h w) l -> f l h w", f=count, h=h, w=w)[frames]
    x = pooled(x)
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    return rearrange((x - low) / (high - low).clamp_min(1e-12), "f l h w -> (f h) (l w)"), {
        "rows": [f"frame {i}" for i in frames], "columns": tokens,
        "says": "How much each pixel looks at a token. White is the most for this token, black the least.",
    }  # fmt: skip


def frames_grid(map_: Tensor, *_: Any) -> Grid:
    """(p f f) -> one map (f f), the mean over the pixels."""
    x = map_.mean(0)
    return x / x.max().clamp_min(1e-12), {
        "rows": [""], "columns": [""],
        "says": "Row: the frame that looks. Column: the frame that it looks at. Mean of all pixels; white is the most.",
    }  # fmt: skip


def pixels_grid(map_: Tensor, frames: list[int], _: Any, sizes: dict[int, Any]) -> Grid:
    """(f p p) -> rows are frames, columns are five query pixels."""
    h, w = sizes[map_.shape[1]]
    places = [(y, x) for y, x in ((0.5, 0.5), (0.2, 0.2), (0.2, 0.8), (0.8, 0.2), (0.8, 0.8))]
    picked = [(int(y * h), int(x * w)) for y, x in places]
    x = rearrange(map_[frames], "f p (h w) -> f p h w", h=h)[:, [y * w + x for y, x in picked]]
    x = pooled(x)
    return rearrange(x / x.amax((2, 3), keepdim=True).clamp_min(1e-12), "f n h w -> (f h) (n w)"), {
        "rows": [f"frame {i}" for i in frames], "columns": [f"pixel {y}, {x}" for y, x in picked],
        "marks": [[100 * (x + 0.5) / w, 100 * (y + 0.5) / h] for y, x in picked],
        "says": "Where one pixel of the frame looks. The circle marks the pixel that looks; white is the most.",
    }  # fmt: skip


GRIDS: dict[str, Callable[..., Grid]] = {
    "text": text_grid, "frames": frames_grid, "spatial": pixels_grid}


def pooled(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, (min(SIDE, x.shape[2]), min(SIDE, x.shape[3])))


def png(x: Tensor) -> str:
    """(h w) or (h w 3) from 0 to 1 -> a data URL of the image as PNG."""
    file = io.BytesIO()
    Image.fromarray((x.float() * 255).round().clamp(0, 255).byte().cpu().numpy()).save(file, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
