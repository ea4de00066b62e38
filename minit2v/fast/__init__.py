"""The fast path: the networks of minit2v/models with the same parameters and results, but with faster operations.

Here are one function for each module, the operations that they use, CUDA graphs, and `bisect`, which finds a faulty
kernel. A network that is called directly runs as it is written. Pipelines call its runner.

    runner(unet)(x, t, context)         as unet(x, t, context); pipelines call this
    optimize(unet, graphs=True)         also rearranges weights in memory; on CUDA, launches predictions as CUDA graphs
    restore(unet)                       turns the fast path off, and puts every weight back where it was

Some things run as they are written in minit2v/models: subclasses, layers inside a wrapper, and modules with hooks. The
whole network does so if gradients are needed, under autocast, and while torch.compile or torch.export trace it.
"""

import logging
import os
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..models.vae import AutoencoderKL
from .executor import UNETS, Executor, UNetExecutor, UNetRunner, VAEExecutor

logger = logging.getLogger(__name__)

executors: "WeakKeyDictionary[nn.Module, Executor | None]" = WeakKeyDictionary()  # None: restored, no fast path


def runner(network: Any) -> Any:
    """A callable with the arguments and the result of the network, and faster. Make a new one for each run.

    It is the network itself if the fast path does not know its class, after `restore`, or with MINIT2V_OPTIMIZE=0.
    """
    known = type(network) in (*UNETS, AutoencoderKL)
    if not known or not is_on():
        return network
    if network not in executors:
        executors[network] = VAEExecutor(network) if isinstance(network, AutoencoderKL) else UNetExecutor(network)
    executor = executors[network]
    if executor is None:
        return network
    free_copies(network)
    return UNetRunner(executor) if isinstance(executor, UNetExecutor) else executor


def free_copies(network: nn.Module) -> None:
    """Frees the transformed copies of weights that the last run has made."""
    executor = executors.get(network)
    if executor is not None and executor.state is not None:
        executor.ops.free_copies()


def is_on() -> bool:
    """Whether $MINIT2V_OPTIMIZE is 1, the default. Raises ValueError if it is neither 0 nor 1."""
    setting = os.environ.get("MINIT2V_OPTIMIZE") or "1"
    if setting not in ("0", "1"):
        raise ValueError(f"MINIT2V_OPTIMIZE must be 0 or 1, not {setting!r}")
    return setting == "1"


def optimize(network: Any, *, graphs: bool = False, compile: bool = False) -> Any:
    """Rearranges the network's weights in memory for speed. Returns its `runner`.

    graphs: on CUDA, launch a UNet's predictions as CUDA graphs. Their memory stays in use until `restore`.
    compile: compile each block of a UNet with torch.compile at its first call, instead of the fast path.
    After changes of the weights, for example by `.to()` or `load_state_dict`, they are rearranged automatically. A copy
    of the network is not optimized. A subclass runs as it is written, and a warning says so.
    """
    restore(network)
    if type(network) not in (*UNETS, AutoencoderKL):
        logger.warning("The fast path does not know the class %s: it runs as it is written.", type(network).__name__)
        return network
    if isinstance(network, AutoencoderKL):
        executors[network] = VAEExecutor(network, lay_out=True)
    else:
        executors[network] = UNetExecutor(network, True, graphs, compile)
    executors[network].refresh()
    return runner(network)


def restore(network: Any) -> None:
    """Turns the fast path off for the network. Its weights get the memory layouts of before `optimize`."""
    if (executor := executors.get(network)) is not None:
        executor.undo()
    executors[network] = None
