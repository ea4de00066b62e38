"""Puts everything that was counted, measured and drawn into one HTML file, which needs no other file."""

import json
from dataclasses import asdict
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from .. import __version__
from .drawing import KINDS, draw
from .sample import Sampled
from .trace import DEVICES, Node, Source, Traced, source_of

FOLDER = Path(__file__).parent
MOST = 2_000_000  # bytes of a page
LEGEND = {
    "space": "res: convolutions in each frame",
    "time": "conv: convolutions along time",
    "space2": "space: pixels of a frame look at each other, then at the text",
    "time2": "{}: each pixel looks at itself in all frames",
}
FOOTER = (
    "Made by minit2v {}. Counted for the networks as they are written, in float16, with the prompt and the negative "
    "prompt as a batch of 2. FLOPs: of convolutions and matrix products; a multiplication and an addition are two. "
    "Bytes: what every operation of PyTorch reads and writes; fused kernels move fewer. Time, counted: for each "
    "operation the longer of FLOPs / peak and bytes / bandwidth."
)


def make_page(traced: Traced, sampled: Sampled | None = None) -> str:
    """The HTML of a traced model. ValueError if it would be larger than 2 MB."""
    unet, video = traced.nodes["unet"], traced.video
    kinds = traced.kinds()
    there = {KINDS[kind][1] for kind, _ in kinds}
    motion = "motion" if any(kind.__name__ == "MotionModule" for kind, _ in kinds) else "time"
    metrics = {"flops": "FLOPs", "bytes": "bytes moved", "parameters": "parameters",
               **{f"seconds:{i}": f"time on {d.name}, counted" for i, d in enumerate(DEVICES)},
               **({"measured": "time, measured"} if sampled else {})}  # fmt: skip
    page = _read("html").substitute(
        title=escape(f"Architecture of {traced.title}"),
        about=escape(f"{type(unet.module).__name__}: {unet.parameters / 1e6:,.4g} million parameters. One denoising "
                     f"step of {video} with guidance takes {_flops(unet.flops)}."),
        style=_read("css").template, script=_read("js").template,
        metrics="".join(f'<option value="{key}">{escape(words)}</option>' for key, words in metrics.items()),
        legend="".join(f'<span class="key"><i style="background: var(--{c})"></i>{escape(words.format(motion))}</span>'
                       for c, words in LEGEND.items() if c in there)
        + '<span class="key"><i style="background: var(--bar)"></i>bar: share of what is chosen above</span>'
        '<span class="key">dashed: skip connections</span>',
        drawing=draw(traced),
        footer=escape(FOOTER.format(__version__)),
        data=_data(traced, sampled),
    )  # fmt: skip
    if (size := len(page.encode())) > MOST:
        raise ValueError(f"the page would have {size / 1e6:.1f} MB, and the limit is {MOST / 1e6:.0f} MB: give fewer "
                         "--steps or --num-frames")  # fmt: skip
    return page


def _flops(n: int) -> str:
    return f"{n / 1e12:.4g} TFLOP" if n >= 1e12 else f"{n / 1e9:.4g} GFLOP"


def _read(suffix: str) -> Template:
    return Template((FOLDER / f"page.{suffix}").read_text(encoding="utf-8"))


def _data(traced: Traced, sampled: Sampled | None) -> str:
    """JSON for page.js. It contains no `<`, so that no text can end the script element."""
    sources: dict[Source, int] = {}
    nodes = []
    for node in traced.nodes.values():
        source = sources.setdefault(source_of(type(node.module)), len(sources))
        nodes.append({**_numbers(node), "name": node.name, "parent": node.parent, "source": source,
                      "inputs": [[name, _plain(value)] for name, value in node.inputs], "output": node.output,
                      "measured": sampled.seconds.get(node.name, 0.0) if sampled else None,
                      "settings": node.module.extra_repr() if type(node.module).__module__.startswith("torch") else ""})
    content = {
        "devices": [d._asdict() for d in DEVICES],
        "nodes": nodes,
        "sources": [asdict(source) for source in sources],
        "kinds": [{"name": kind.__name__, "measured": _measured(traced, sampled, kind), **_numbers(total)}
                  for kind, total in traced.kinds()],
        "measured_on": sampled.measured_on if sampled else "",
        "maps": sampled.maps if sampled else None,
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _measured(traced: Traced, sampled: Sampled | None, kind: type) -> float | None:
    """The seconds of all blocks of a kind in the UNet."""
    if sampled is None:
        return None
    return sum(sampled.seconds[name] for name, node in traced.nodes.items()
               if type(node.module) is kind and name.startswith("unet."))  # fmt: skip


def _numbers(node: Node) -> dict[str, Any]:
    return {"calls": node.calls, "parameters": node.parameters, "flops": node.flops, "bytes": node.bytes,
            "seconds": [float(f"{s:.4g}") for s in node.seconds]}  # fmt: skip


def _plain(value: Any) -> Any:
    return value if isinstance(value, tuple | int | float | str) else str(value)
