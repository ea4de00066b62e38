"""Ten seconds (80 frames) of the embedded models, seen 16 frames at a time, and loops: are shape and colour kept?

    PYTHONPATH=.:kernels:convert python benchmarks/long_videos.py [--frames 80] [--figures docs/figures]

Each video goes back and forth: a text for each frame says where to, and the text changes within three frames. Written
to benchmarks/results/long_videos.json, for every video:

    right    share of the frames in which the accuracy reader sees the shape and the colour of the text
    seam     mean change from one frame to the next where a window begins or ends, over that elsewhere
    closing  (loops) change from the last frame to the first, over the mean change from one frame to the next
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minit2v import AnimateDiffPipeline, DiffusionPipeline, MotionAdapter
from minit2v.files.video import export_to_gif
from minit2v.techniques.context_windows import ContextWindows
from minit2v.training.world import COLOURS

REPO = Path(__file__).resolve().parent.parent
LENGTH, OVERLAP, TURN, FADE = 16, 8, 16, 2
VIDEOS = (  # command, colour, shape, the ways it goes in turn, whether it is a loop
    ("generate", "red", "circle", ("right", "left"), False),
    ("generate", "green", "square", ("down", "up"), False),
    ("generate", "yellow", "circle", ("left", "right"), True),
    ("animate", "red", "circle", ("right", "left"), False),
    ("animate", "blue", "square", ("down", "up"), False),
    ("animate", "magenta", "circle", ("left", "right"), True),
)


def texts(colour: str, shape: str, ways: tuple[str, ...], frames: int) -> dict[int, str]:
    """The same text at the beginning and at the end of each turn: what lies between is that text, too."""
    found = {}
    for k, begin in enumerate(range(0, frames, TURN)):
        text = f"a {colour} {shape} moving {ways[k % len(ways)]}"
        found |= {begin: text, min(begin + TURN - FADE, frames - 1): text}
    return found


def is_right(frame: Tensor, colour: str, shape: str) -> bool:
    """frame (3 h w) in [0, 1]: brightness, the nearest colour, and how much of its box the shape fills."""
    mask = frame.amax(0) > 0.5
    area = mask.sum()
    if area < 30:
        return False
    mean = (frame * mask).sum((1, 2)) / area
    nearest = (torch.tensor(list(COLOURS.values())) - mean / mean.max()).abs().sum(1).argmin()
    width, height = ((mask.sum(axis) >= 2).sum() for axis in (0, 1))
    fill = area / (width * height).clamp(min=1)
    seen = "triangle" if fill < 0.67 else "circle" if fill < 0.89 else "square"
    return (list(COLOURS)[int(nearest)], seen) == (colour, shape)


def seam(video: Tensor, windows: ContextWindows, calls: int) -> float:
    """video (f 3 h w): change at the borders of all windows of a run, over that elsewhere."""
    change = (video[1:] - video[:-1]).abs().mean((1, 2, 3)).tolist()
    at, elsewhere = [], []
    for call in range(calls):
        found = windows.windows(len(video), call)
        borders = {w[0] for w in found} | {(w[-1] + 1) % len(video) for w in found}
        for i, value in enumerate(change, 1):  # from frame i - 1 to frame i
            (at if i in borders else elsewhere).append(value)
    return statistics.mean(at) / statistics.mean(elsewhere)


def pipelines() -> dict[str, Any]:
    found = {
        "generate": DiffusionPipeline.from_pretrained("shapes"),
        "animate": AnimateDiffPipeline.from_pretrained(
            "shapes-image", motion_adapter=MotionAdapter.from_pretrained("shapes-motion")
        ),
    }
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
        pipe.enable_free_noise(LENGTH)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=80)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks" / "results" / "long_videos.json")
    parser.add_argument("--figures", type=Path)
    args = parser.parse_args()
    pipes, results = pipelines(), []
    for command, colour, shape, ways, loop in VIDEOS:
        pipe = pipes[command]
        pipe.enable_context_windows(LENGTH, overlap=OVERLAP, loop=loop)
        frames = args.frames // (2 * TURN) * 2 * TURN if loop else args.frames  # a loop ends where it began
        for seed in range(args.seeds):
            video = pipe(texts(colour, shape, ways, frames), num_frames=frames, num_inference_steps=args.steps,
                         guidance_scale=1.5, generator=torch.Generator().manual_seed(seed), output_type="pt").frames[0]
            video = video.float()
            change = (video.roll(-1, 0) - video).abs().mean((1, 2, 3))
            about = {
                "command": command, "text": f"a {colour} {shape} moving {' and '.join(ways)}", "seed": seed,
                "loop": loop, "frames": frames,
                "right": sum(is_right(frame, colour, shape) for frame in video) / frames,
                "seam": round(seam(video, pipe._context_windows, args.steps), 3),
            }  # fmt: skip
            if loop:
                about["closing"] = round((change[-1] / change[:-1].mean()).item(), 3)
            print(json.dumps(about), flush=True)
            results.append(about)
            if args.figures and seed == 0:
                name = f"long-{command}-{colour}-{shape}{'-loop' * loop}.gif"
                export_to_gif(video.permute(0, 2, 3, 1).numpy(), args.figures / name, fps=8)
    about = {"command": "python benchmarks/long_videos.py", "window": LENGTH, "overlap": OVERLAP, "steps": args.steps}
    args.out.write_text(json.dumps(about | {"videos": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
