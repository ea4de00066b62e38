"""The executor of a network runs it on the fast path. It notices changes of the network, and adapts to them."""

import threading
import weakref
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from operator import is_
from typing import Any

import torch
import torch.nn.modules.module as hooks
from torch import Tensor, nn

from minit2v_kernels import _dispatch

from ..memory.stream import Bring, BringLayer, is_streamed
from ..models.image_prompt import ImageAttention, Prompt
from ..models.unet import UNet
from ..models.unet2d import UNet2DConditionModel
from ..models.unet3d import UNet3DConditionModel
from ..models.unet_motion import UNetMotionModel
from ..models.vae import AutoencoderKL, DiagonalGaussian
from . import modules
from .cpu import CPUOps
from .graphs import Graphs, can_capture
from .layout import Places, laid_together, lay_together
from .modules import PARTS, Run
from .ops import Ops

UNETS = (UNet3DConditionModel, UNet2DConditionModel, UNetMotionModel)
# The original methods of the classes that modules.py replaces.
WRITTEN = [
    (cls, name, method)
    for cls in (*PARTS, *UNETS, UNet, AutoencoderKL)
    for name, method in vars(cls).items()
    if callable(method) and (name == "forward" or cls.__module__.startswith("minit2v."))
]


class Executor:
    """Runs one network. Modules that are exactly as in minit2v/models run by minit2v/fast/modules.py, others unchanged.

    lay_out: whether weights may be rearranged in memory. `undo` puts them back.
    """

    def __init__(self, network: nn.Module, lay_out: bool = False):
        self._network = weakref.ref(network)  # weak, so that a deleted network is freed at once
        self.places = Places(network) if lay_out else None
        self.lock = threading.RLock()
        self.state: State | None = None
        self.plans = 0  # number of plans so far
        self.launched = "eager"  # or "graph"

    @property
    def network(self) -> Any:
        return self._network()

    def applies(self, x: Tensor) -> bool:
        """Whether the fast path can run the network on x now: no gradients, no autocast, no tracing."""
        network = self.network
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_autocast(x.device.type):
            return False
        weight = next(network.parameters())
        if x.dtype != weight.dtype or x.device != weight.device or type(x) is not Tensor:
            return False
        if is_touched(network) or is_overridden(network):
            return False
        if any(vars(cls).get(name) is not method for cls, name, method in WRITTEN):
            return False
        return not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks)

    def refresh(self) -> None:
        """Makes a new plan if the network's modules, weights or hooks have changed since the last one."""
        with self.lock:
            if self.state is None or not self.state.holds():
                self.renew()
                self.state = State(self.network)
                self.plans += 1

    @torch.inference_mode(False)
    @torch.no_grad()
    def renew(self) -> None:
        """Makes a plan: how to run the present modules."""
        if self.places is not None:
            self.lay_out()
        self.known = frozenset(m for m in self.network.modules() if is_known(m))
        self.ops = self.choose_ops(next(self.network.parameters()))
        if is_streamed(self.network):  # offloaded weights cannot be fused or copied
            self.ops.room = 0
            return
        for m in self.known:
            if isinstance(m, modules.Attention) and m.to_q.bias is m.to_k.bias is m.to_v.bias is None:
                weight = laid_together([m.to_q.weight, m.to_k.weight, m.to_v.weight])
                if weight is not None:
                    self.ops.together[m] = weight

    def choose_ops(self, weight: Tensor) -> Ops:
        """The operations for this device and dtype. weight: any weight of the network."""
        ops = Ops(weight, launched=self.launched)
        on_cpu = weight.is_cpu and weight.dtype == torch.float32
        # If the user has chosen kernels, they run (in Triton's interpreter).
        return CPUOps(weight, self.network) if on_cpu and not ops.kernels else ops

    def lay_out(self) -> None:
        """Puts q, k and v of each attention into one tensor. On CUDA, convolutions get channels-last weights."""
        for m in self.network.modules():
            if isinstance(m, modules.Attention) and is_known(m):
                lay_together([m.to_q.weight, m.to_k.weight, m.to_v.weight])
            if isinstance(m, nn.Conv2d | nn.Conv3d) and m.weight.is_cuda and self.wants_channels_last(m.weight):
                layout = torch.channels_last if isinstance(m, nn.Conv2d) else torch.channels_last_3d
                m.weight.data = m.weight.contiguous(memory_format=layout)

    def wants_channels_last(self, weight: Tensor) -> bool:
        return True

    def undo(self) -> None:
        """Puts every weight back where it was."""
        if self.places is not None:
            self.places.put_back(self.network.named_parameters())


def is_autocast(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


class State:
    """What a plan depends on: the modules, the addresses of the weights, the hooks, and the chosen kernels."""

    def __init__(self, network: nn.Module):
        self.modules = list(network.modules())[1:]  # without the network, so that it can be freed
        self.types = list(map(type, self.modules))
        self.own = [m.__dict__ for m in (network, *self.modules)]
        self.children = list(chain.from_iterable(d["_modules"].values() for d in self.own))
        self.hooks = [d[name] for d in self.own for name in ("_forward_hooks", "_forward_pre_hooks")]
        self.weights = self.now_weights()
        self.places = self.now_places()
        self.touched = self.now_touched()
        self.setting = _dispatch.setting()

    def now_weights(self) -> list[Tensor | None]:
        return list(chain.from_iterable(d["_parameters"].values() for d in self.own))

    def now_places(self) -> list[int]:
        return [p.data_ptr() for p in self.weights if p is not None]

    def now_touched(self) -> list[int]:
        return [*map(len, self.hooks), *("forward" in d for d in self.own)]

    def holds(self) -> bool:
        """Whether nothing has changed. This takes about half a millisecond for a thousand modules."""
        children = chain.from_iterable(d["_modules"].values() for d in self.own)
        return (
            self.setting == _dispatch.setting()
            and self.types == list(map(type, self.modules))
            and all(map(is_, self.children, children))
            and all(map(is_, self.weights, self.now_weights()))
            and sum(map(len, (d["_modules"] for d in self.own))) == len(self.children)
            and self.places == self.now_places()
            and self.touched == self.now_touched()
        )


def is_touched(m: nn.Module) -> bool:
    """Whether the module has hooks, so that its inputs and outputs may be read or changed."""
    return bool(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__)


def is_overridden(m: nn.Module) -> bool:
    """Whether a method was replaced on this one module."""
    return any(hasattr(type(m), name) and callable(value) for name, value in m.__dict__.items())


def is_altered(m: nn.Module) -> bool:
    """Whether it has other hooks than those of offloading, which modules.py knows."""
    hooks = chain(m._forward_hooks.values(), m._forward_pre_hooks.values())
    return "forward" in m.__dict__ or any(not isinstance(h, Bring) or isinstance(h, BringLayer) for h in hooks)


def is_known(m: nn.Module) -> bool:
    """Whether the module, and all parts that its function in modules.py reads, are exactly as written."""
    parts = PARTS.get(type(m))
    if parts is None or is_altered(m):
        return False
    if any(p is not None and type(p) is not nn.Parameter for p in m._parameters.values()):
        return False
    if isinstance(m, nn.GroupNorm | nn.LayerNorm) and (m.weight is None or m.bias is None):
        return False
    if not all(type(p) in classes and is_known(p) for name, classes in parts.items() for p in named(m, name)):
        return False
    return is_usual(m)


def is_usual(m: nn.Module) -> bool:
    """Whether the layers inside have the sizes and biases that the module's function needs."""
    if isinstance(m, modules.TemporalConv):
        return all(
            c.kernel_size == (3, 1, 1) and c.stride == c.dilation == (1, 1, 1) and c.padding == (1, 0, 0)
            and c.groups == 1 and c.padding_mode == "zeros" and c.bias is not None
            for c in m.convs
        )  # fmt: skip
    if isinstance(m, modules.ResBlock):
        narrow = isinstance(m.skip, nn.Identity) or (m.skip.kernel_size == m.skip.stride == (1, 1))
        return m.conv1.bias is not None and m.emb.bias is not None and narrow
    return not isinstance(m, modules.FeedForward) or m.proj_in.bias is not None


def named(m: nn.Module, name: str) -> Iterator[nn.Module | None]:
    """The part with this name. "blocks.*" gives all parts of a list."""
    first, _, rest = name.partition(".")
    part = m._modules.get(first)
    if not rest:
        yield part
    elif rest == "*":
        yield from part
    else:
        yield part[int(rest)] if isinstance(part, nn.ModuleList) and len(part) > int(rest) else None


class UNetExecutor(Executor):
    """The executor of a UNet."""

    def __init__(self, network: UNet, lay_out: bool = False, graphs: bool = False, compile: bool = False):
        super().__init__(network, lay_out)
        self.graphs = Graphs() if graphs else None
        self.launched = "graph" if graphs else "eager"
        self.compile = compile

    def predict(self, x: Tensor, t: int | float | Tensor, context: Tensor | Prompt, texts: "Texts") -> Tensor:
        """x (b c f h w), t a number or (b,), context (b l d) or (b f l d) -> the prediction (b c f h w)."""
        unet = self.network
        one = not isinstance(t, Tensor) or t.numel() == 1
        t, flat = unet.check(x, t, context)
        t = t[:1] if one else t  # one timestep for all videos is embedded once
        self.refresh()
        of_text = texts.of(self, context, flat)
        if self.graphs is None or not can_capture(x) or any(map(is_touched, self.state.modules)):
            return self.run(x, t, flat, of_text)
        parts = tensors_of(flat)

        def run(x: Tensor, t: Tensor, *tensors: Tensor) -> Tensor:
            own, rest = tensors[: len(parts)], iter(tensors[len(parts) :])
            context = flat.of(own) if isinstance(flat, Prompt) else own[0]
            return self.run(x, t, context, {m: tuple(islice(rest, len(made))) for m, made in of_text.items()})

        scales = tuple(m.scales for m in self.image_attentions)
        key = repr(unet.config), unet.chunking, unet.free_u, getattr(unet, "free_noise", None), scales
        return self.graphs.run(key, run, [x, t, *parts, *chain.from_iterable(of_text.values())])

    def run(self, x: Tensor, t: Tensor, context: Tensor | Prompt, texts: dict[nn.Module, tuple[Tensor, ...]]) -> Tensor:
        """x (b c f h w), t (1,) or (b,), context (b l d) or ((b f) l d). Their shapes have been checked."""
        run = Run(self.ops, self.known, x.shape[2], context=context, texts=texts, compiled=self.compiled)
        modules.times_of(run, self.network, t, self.times)
        run.emb = run.emb.expand(len(x), -1).repeat_interleave(run.f, dim=0)
        if not self.compiled:
            return modules.unet(run, self.network, x)
        # All blocks share their code, and PyTorch compiles only 8 variants of a function by default.
        with torch._dynamo.config.patch(cache_size_limit=2 * len(self.compiled)):
            return modules.unet(run, self.network, x)

    def renew(self) -> None:
        super().renew()
        unet = self.network
        self.image_attentions = [m for m in unet.modules() if isinstance(m, ImageAttention)]
        self.compiled: dict[nn.Module, Any] = {}
        if self.compile:
            # PyTorch's compiler would ignore later changes of hooks. So blocks with hooks are not compiled.
            free = [block for block in unet.blocks() if not any(map(is_touched, block.modules()))]
            self.compiled = {block: torch.compile(block, dynamic=False) for block in free}
            self.known -= self.compiled.keys()
        parts = [p.res for p in unet.blocks() if p in self.known and p.res in self.known]
        joined = [laid_together(each) for each in of_times(parts)] if parts else [None]
        apart = is_streamed(unet) or any(x is None for x in joined)
        self.times = None if apart else tuple(joined)
        if self.graphs is not None:
            self.graphs.clear()

    def lay_out(self) -> None:
        super().lay_out()
        parts = [p.res for p in self.network.blocks() if is_known(p) and is_known(p.res)]
        if parts:
            for each in of_times(parts):
                lay_together(each)

    def undo(self) -> None:
        if self.graphs is not None:
            self.graphs.clear()
        super().undo()


def of_times(parts: list[Any]) -> list[list[nn.Parameter]]:
    """The parameters of all ResBlocks for the timestep: weights, biases, and biases of their first convolutions."""
    return [[p.emb.weight for p in parts], [p.emb.bias for p in parts], [p.conv1.bias for p in parts]]


class Texts:
    """Cached keys and values of a text. They are valid as long as the text is the same unchanged tensor."""

    def __init__(self) -> None:
        self.last: tuple[Any, list[int], dict[nn.Module, tuple[Tensor, ...]]] | None = None

    def of(
        self, executor: UNetExecutor, context: Tensor | Prompt, flat: Tensor | Prompt
    ) -> dict[nn.Module, tuple[Tensor, ...]]:
        """Keys and values (n l h d) for each cross-attention. context: the key of the cache. flat: it as (n l d)."""
        uncounted = any(x.is_inference() for x in tensors_of(context))
        if not uncounted and self.last is not None and self.last[0]() is context:
            if self.last[1] == versions(executor, context, self.last[2]):
                return self.last[2]
        made = modules.texts_of(Run(executor.ops, executor.known), executor.network, flat)
        self.last = None if uncounted else (weakref.ref(context), versions(executor, context, made), made)
        return made


def tensors_of(context: Tensor | Prompt) -> list[Tensor]:
    return context.tensors() if isinstance(context, Prompt) else [context]


def versions(executor: UNetExecutor, context: Tensor | Prompt, attentions: Iterable[Any]) -> list[int]:
    """How often the text, and the weights that read it, were changed in place. Inference tensors do not count it."""
    of_text = [p for m in attentions for p in (m.to_k.weight, m.to_v.weight)]
    of_images = [to.weight for m in executor.image_attentions for to in (*m.to_k_ip, *m.to_v_ip)]
    weights = (p for p in (*of_text, *of_images) if not p.is_inference())
    return [executor.plans, *(x._version for x in tensors_of(context)), *(p._version for p in weights)]


class UNetRunner:
    """Runs a UNet's executor for one video, whose steps all have the same text. It is called like the UNet.

    Keys and values of the text are computed once. They are computed again if the text or the weights that read it
    change. Changes through `.data` are not noticed, because PyTorch does not count them. Make a new runner after them.
    """

    def __init__(self, executor: UNetExecutor):
        self.executor, self.network, self.texts = executor, executor.network, Texts()

    def __call__(self, x: Tensor, t: int | float | Tensor, context: Tensor | Prompt) -> Tensor:
        unet = self.network
        if not self.executor.applies(x):
            return unet(x, t, context)
        if isinstance(unet, UNet2DConditionModel):
            if x.ndim != 4:
                return unet(x, t, context)  # it raises the error
            return self.executor.predict(x[:, :, None], t, context, self.texts)[:, :, 0]
        return self.executor.predict(x, t, context, self.texts)


class VAEExecutor(Executor):
    """The executor of a VAE."""

    @property
    def config(self) -> Any:
        return self.network.config

    def encode(self, x: Tensor, chunk_size: int | None = None) -> DiagonalGaussian:
        """As AutoencoderKL.encode."""
        vae, factor = self.network, self.config.factor
        if is_overridden(vae):
            return vae.encode(x, chunk_size)
        vae.check("x", x, self.config.in_channels, factor)
        return DiagonalGaussian(vae.in_pieces(self.encode_frames, x, chunk_size, factor, 1))

    def decode(self, z: Tensor, chunk_size: int | None = None) -> Tensor:
        """As AutoencoderKL.decode."""
        vae = self.network
        if is_overridden(vae):
            return vae.decode(z, chunk_size)
        vae.check("z", z, self.config.latent_channels)
        return vae.in_pieces(self.decode_frames, z, chunk_size, 1, self.config.factor)

    def encode_frames(self, x: Tensor) -> Tensor:
        if not self.applies(x):
            return self.network.encode_frames(x)
        self.refresh()
        return modules.encode_frames(Run(self.ops, self.known), self.network, x)

    def decode_frames(self, z: Tensor) -> Tensor:
        if not self.applies(z):
            return self.network.decode_frames(z)
        self.refresh()
        return modules.decode_frames(Run(self.ops, self.known), self.network, z).contiguous()
