"""Noise schedules, grids of timesteps, spacings of sigmas: one function for each name in a config."""

import math

import numpy as np
import torch
from torch import Tensor

# --- Noise schedules: (num_train_timesteps,) betas


def linear_betas(start: float, end: float, n: int, dtype: torch.dtype) -> Tensor:
    """Linear in beta: DDPM, AnimateDiff. (ldm and ComfyUI call it `sqrt_linear`.)"""
    return torch.linspace(start, end, n, dtype=dtype)


def scaled_linear_betas(start: float, end: float, n: int, dtype: torch.dtype) -> Tensor:
    """Linear in sqrt(beta): Stable Diffusion, ModelScope, Zeroscope. (ldm and ComfyUI call it `linear`.)"""
    return torch.linspace(start**0.5, end**0.5, n, dtype=dtype) ** 2


def cosine_betas(start: float, end: float, n: int, dtype: torch.dtype) -> Tensor:
    """Cosine in alpha_bar, each beta at most 0.999 (Nichol and Dhariwal, arXiv:2102.09672, eq. 17)."""
    bar = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
    return torch.tensor([min(1 - b / a, 0.999) for a, b in zip(bar, bar[1:], strict=False)], dtype=dtype)


BETA_SCHEDULES = {"linear": linear_betas, "scaled_linear": scaled_linear_betas, "squaredcos_cap_v2": cosine_betas}


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and stretch sqrt(alpha_bar) so that it ends at exactly 0 (Lin et al., arXiv:2305.08891, algorithm 1)."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    bar = root**2
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


# --- Grids: n falling timesteps in 0 ... total - 1 (table 2 of arXiv:2305.08891). Only `leading` uses the offset.


def leading(total: int, n: int, offset: int = 0) -> np.ndarray:
    """(n - 1) r, ... 2r, r, 0, plus the offset, with r = total // n: DDIM's `leading`. It has no pure noise."""
    return np.arange(n)[::-1] * (total // n) + offset


def leading_open(total: int, n: int, offset: int = 0) -> np.ndarray:
    """n r, ... 2r, r, plus the offset, with r = total // (n + 1): the `leading` of the DPM-Solver family."""
    return leading(total, n + 1, offset)[:-1]


def linspace(total: int, n: int, offset: int = 0) -> np.ndarray:
    """n evenly spaced points from total - 1 to 0, both included, not rounded."""
    return np.linspace(0, total - 1, n)[::-1]


def linspace_open(total: int, n: int, offset: int = 0) -> np.ndarray:
    """n + 1 evenly spaced points from total - 1 to 0, without the 0: the `linspace` of the DPM-Solver family."""
    return linspace(total, n + 1)[:-1]


def trailing(total: int, n: int, offset: int = 0, step: float | None = None) -> np.ndarray:
    """total - 1, and then lower in steps of total / n. Models with zero terminal SNR need this grid.

    For 62 of the n up to 1000 (61, 103, ...), np.arange gives one point too many, -1. It is removed.
    """
    return np.round(np.arange(total, 0, -(step or total / n)))[:n] - 1


GRIDS = {"leading": leading, "linspace": linspace, "trailing": trailing}
OPEN_GRIDS = {"leading": leading_open, "linspace": linspace_open, "trailing": trailing}


# --- Spacings: n sigmas from `high` down to `low`


def karras_sigmas(high: float, low: float, n: int, rho: float = 7.0) -> np.ndarray:
    """Evenly spaced in sigma**(1/rho) (Karras et al. 2022, arXiv:2206.00364, eq. 5)."""
    return (high ** (1 / rho) + np.linspace(0, 1, n) * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def exponential_sigmas(high: float, low: float, n: int) -> np.ndarray:
    """Evenly spaced in log sigma. This is DPM-Solver's uniform log-SNR (Lu et al. 2022, arXiv:2206.00927)."""
    return np.exp(np.linspace(math.log(high), math.log(low), n))


def beta_sigmas(high: float, low: float, n: int, shape: float = 0.6) -> np.ndarray:
    """The quantiles of the Beta(0.6, 0.6) distribution, which are dense at both ends (arXiv:2407.12173)."""
    return low + (high - low) * beta_quantiles(1 - np.linspace(0, 1, n), shape)


def beta_quantiles(p: np.ndarray, a: float) -> np.ndarray:
    """The inverse of the cumulative distribution of Beta(a, a), with an error of about 1e-12.

    The distribution is symmetric, so x <= 1/2 is enough. There each term of the series of the incomplete beta function
    (DLMF 8.17.7) adds a bit. It uses bisection, because the slope at 0 is infinite.
    """
    k = np.arange(60)
    terms = np.cumprod(np.concatenate([[1.0], (k[1:] - a) / k[1:]])) / (a + k)
    terms *= math.gamma(2 * a) / math.gamma(a) ** 2
    tail = np.minimum(p, 1 - p)
    low, high = np.zeros_like(tail), np.full_like(tail, 0.5)
    for _ in range(60):
        x = (low + high) / 2
        below = x**a * (terms * x[:, None] ** k).sum(1) < tail
        low, high = np.where(below, x, low), np.where(below, high, x)
    return np.where(p <= 0.5, high, 1 - high) * np.where(p == 0, 0.0, 1.0)
