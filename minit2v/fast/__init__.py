"""The fast path: the networks of minit2v/models once more, the same parameters and numbers, run for speed.

What belongs here: one function for each module, the operations they choose from, CUDA graphs, and `bisect`, which
finds the kernel that is to blame. A network that is called directly runs as it is written; pipelines call its runner.

    runner(unet)(x, t, context)         as unet(x, t, context); this is what a pipeline calls
    optimize(unet, graphs=True)         also move weights in memory for speed; on CUDA, launch predictions as graphs
    restore(unet)                       run it as it is written, every weight where it was, to the last bit

What the fast path does not know runs as it is written: a subclass, a layer that something wraps, a module with a hook;
and everything where gradients are wanted, under autocast, and while torch.compile or torch.export trace.
"""

import logging
import os
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..models.vae import AutoencoderKL
from .executor import UNETS, Executor, UNetExecutor, UNetRunner, VAEExecutor

logger = logging.getLogger(__name__)

executors: "WeakKeyDictionary[nn.Module, Executor | None]" = WeakKeyDictionary()  # None: restored, to run as written


def runner(network: Any) -> Any:
    """What computes as the network does, faster where it can, for one run: to be called as it is.

    The network itself for a class that the fast path does not know, after `restore`, and with MINIT2V_OPTIMIZE=0.
    """
    known = type(network) in (*UNETS, AutoencoderKL)
    if not known or not is_on():
        return network
    if network not in executors:
        executors[network] = VAEExecutor(network) if isinstance(network, AutoencoderKL) else UNetExecutor(network)
    executor = executors[network]
    if executor is None:
        return network
    if executor.state is not None:
        executor.ops.check_kept()
    return UNetRunner(executor) if isinstance(executor, UNetExecutor) else executor


def is_on() -> bool:
    """What $MINIT2V_OPTIMIZE says: 1, the default, or 0. ValueError on anything else."""
    setting = os.environ.get("MINIT2V_OPTIMIZE") or "1"
    if setting not in ("0", "1"):
        raise ValueError(f"MINIT2V_OPTIMIZE must be 0 or 1, not {setting!r}")
    return setting == "1"


def optimize(network: Any, *, graphs: bool = False, compile: bool = False) -> Any:
    """Lay the network's weights out for speed, once or anew. Returns its `runner`.

    graphs: launch a UNet's predictions on CUDA as CUDA graphs; their memory stays taken until `restore`.
    compile: torch.compile each block of a UNet as it is written, at its first call.
    After `.to()`, `load_state_dict` and whatever else changes the weights, they are laid out again by themselves. A
    copy of the network comes without all this. A subclass runs as it is written, and a warning says so.
    """
    restore(network)
    if type(network) not in (*UNETS, AutoencoderKL):
        logger.warning("%s is not a class that the fast path knows: it runs as it is written.", type(network).__name__)
        return network
    if isinstance(network, AutoencoderKL):
        executors[network] = VAEExecutor(network, lay_out=True)
    else:
        executors[network] = UNetExecutor(network, True, graphs, compile)
    executors[network].refresh()
    return runner(network)


def restore(network: Any) -> None:
    """Run the network as it is written from now on, its weights in the memory layouts of before `optimize`."""
    if (executor := executors.get(network)) is not None:
        executor.undo()
    executors[network] = None
