"""Prompts that change over time: texts at some frames, and interpolated text states at the frames in between."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minit2v_convert.rename import nearest

INTERPOLATIONS = ("linear", "spherical")
# (first frame, last frame, states (1 l d) of the first and of the last) -> states (n l d) from the first to the last
Interpolate = Callable[[int, int, Tensor, Tensor], Tensor]


def check_frame_prompts(name: str, prompts: Any, frames: int | None) -> None:
    """Raises ValueError if a dictionary {frame: text} is empty or wrong, or if a frame is not in 0 ... frames - 1."""
    if not isinstance(prompts, Mapping):
        return
    if not prompts:
        raise ValueError(f"{name} is an empty dictionary: give at least one frame: text")
    for frame, text in prompts.items():
        if not isinstance(frame, int) or isinstance(frame, bool) or frame < 0:
            raise ValueError(f"{name}: a frame must be a whole number from 0, not {frame!r}")
        if frames is not None and frame >= frames:
            raise ValueError(f"{name}: there is no frame {frame}, only 0 to {frames - 1}")
        if not isinstance(text, str):
            raise ValueError(f"{name}: frame {frame} must have a text, not {text!r:.80}")


def check_interpolation(how: Any) -> None:
    if not callable(how) and how not in INTERPOLATIONS:
        raise ValueError(f"prompt_interpolation must be one of {', '.join(INTERPOLATIONS)}, or a function, not "
                         f"{how!r}{nearest(str(how), INTERPOLATIONS)}")


def spread_over_frames(states: Tensor, at: Sequence[int], frames: int, how: str | Interpolate = "linear") -> Tensor:
    """states (k l d) of the k texts at the frames `at`, in rising order -> states of all frames (frames l d).

    Frames before the first text get its states. Frames after the last text get its states.
    how: "linear", "spherical" (along the arc between the two vectors of each token), or a function as `Interpolate`.
    """
    parts = [states[:1].expand(at[0] + 1, -1, -1)]
    for i, (first, last) in enumerate(zip(at, at[1:], strict=False)):
        a, b = states[i : i + 1], states[i + 1 : i + 2]
        if callable(how):
            between = how(first, last, a, b)
            want = (last - first + 1, *states.shape[1:])
            if not isinstance(between, Tensor) or tuple(between.shape) != want:
                found = tuple(between.shape) if isinstance(between, Tensor) else type(between).__name__
                raise ValueError(f"the interpolation of prompts must return a tensor {want}, not {found}")
        else:
            share = torch.linspace(0, 1, last - first + 1, dtype=torch.float64)[:, None, None].to(a.device, a.dtype)
            between = (1 - share) * a + share * b if how == "linear" else along_arc(a, b, share)
        parts.append(between[1:])
    parts.append(states[-1:].expand(frames - 1 - at[-1], -1, -1))
    return torch.cat(parts)


def along_arc(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation (Shoemake 1985): a, b (1 l d), share (n 1 1) from 0 to 1 -> (n l d)."""
    wide = torch.promote_types(a.dtype, torch.float32)
    x, y, s = a.to(wide), b.to(wide), share.to(wide)
    angle = torch.acos(torch.cosine_similarity(x, y, dim=-1).clamp(-1, 1))[..., None]
    sine = angle.sin()
    arc = (((1 - s) * angle).sin() * x + (s * angle).sin() * y) / sine
    return torch.where(sine > 1e-4, arc, (1 - s) * x + s * y).to(a.dtype)  # linear for parallel vectors
