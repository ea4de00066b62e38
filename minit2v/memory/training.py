"""Will training fit? Counts the memory at the peak of a training step, and finds the fastest method that fits.

    planner = training_planner_of_model("ms-1.7b", "lora", frames=16, height=256, width=256)   of training/planning.py
    planner.plan(Method(checkpointing=True))                                                   bytes, by kind
    planner.choose("24GiB")                                                                    the fastest that fits

Forward, loss and backward of a step run on `meta`. live.py counts the bytes of all tensors while they are alive. The
optimizer's states, the moving average and the buffers of sharding are computed, not run. Text encoder and VAE are not
counted, because text states and latents come from the cache.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from .live import Live, OnMeta
from .plan import TEXT, parse_memory

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("frozen weights", "trained weights", "gradients", "optimizer", "EMA", "copies", "communication", "activations")


class Clips(NamedTuple):
    """The clips that a process computes in a step."""

    frames: int
    height: int  # in pixels
    width: int
    clips: int = 1

    def __str__(self) -> str:
        many = f"{self.clips} clips" if self.clips > 1 else "a clip"
        return f"{many} of {self.frames} frame{'s' * (self.frames > 1)} of {self.width}x{self.height}"


@dataclass(frozen=True)
class Method:
    """Ways to do the same training with less memory."""

    precision: str = "bf16"  # of frozen matrices and of autocast; trained weights are float32
    checkpointing: bool = False
    accumulate: int = 1  # number of pieces in which a process computes its clips
    eight_bits: bool = False  # 8-bit states of the optimizer
    shard: bool = False  # spread weights, gradients and optimizer states over the processes

    def options(self) -> list[str]:
        """The options of `minit2v train` for this method."""
        found = ["--precision", self.precision]
        found += ["--checkpointing"] * self.checkpointing
        found += ["--accumulate", str(self.accumulate)] if self.accumulate > 1 else []
        return found + ["--optimizer", "adamw8bit"] * self.eight_bits + ["--parallel", "fsdp"] * self.shard

    def __str__(self) -> str:
        extras = {"checkpointing": self.checkpointing, f"in {self.accumulate} pieces": self.accumulate > 1,
                  "8-bit optimizer": self.eight_bits, "sharded": self.shard}  # fmt: skip
        return ", ".join([self.precision, *(name for name, on in extras.items() if on)])


class TrainingPlan(NamedTuple):
    """A method, and the memory at the peak of a step."""

    method: Method
    kinds: Mapping[str, int]  # {kind of KINDS: bytes}, without kinds of 0 bytes

    @property
    def peak(self) -> int:
        return sum(self.kinds.values())

    def __str__(self) -> str:
        return f"{binary(self.peak)} with {self.method}: {' '.join(self.method.options())}"


def binary(size: float) -> str:
    """Bytes as a text in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


class TrainingPlanner:
    """Counts the memory that training a UNet takes. Every count is made once."""

    def __init__(
        self, unet: Any, trained: Iterable[Tensor], clips: Clips, *, tokens: int = TEXT, factor: int = 8,
        ema: bool = False, processes: int = 1, device: str = "cuda",
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        """unet: on `meta`, in training mode. Trained parameters have `requires_grad`.

        trained: all parameters that the optimizer has. clips: of one process. tokens: of a caption.
        factor: pixels for each latent, in each direction. ema: whether the trained weights have a moving average.
        around: makes a context in which the step runs.
        """
        self.unet, self.trained, self.clips = unet, list(trained), clips
        self.tokens, self.factor, self.around = tokens, factor, around
        self.ema, self.processes, self.device = ema, processes, device
        self.counts: dict[Any, Counter[str]] = {}
        if not self.trained:
            raise ValueError("no parameter is trained: give at least one")

    def frozen(self) -> list[Tensor]:
        mine = {id(p) for p in self.trained}
        return [v for v in (*self.unet.parameters(), *self.unet.buffers()) if id(v) not in mine]

    def plan(self, method: Method = Method()) -> TrainingPlan:
        trained, parts = 4 * sum(p.numel() for p in self.trained), self.processes if method.shard else 1
        self.set_dtypes(method.precision)
        kinds = Counter({
            "frozen weights": sum(v.nbytes for v in self.frozen()) // parts,
            "trained weights": trained // parts,
            "optimizer": (trained // 2 if method.eight_bits else 2 * trained) // parts,
            "EMA": trained * self.ema // parts,
        })  # fmt: skip
        kinds += self.step(method)
        if method.shard:
            kinds["gradients"] += trained // parts
            kinds["communication"] += self.gathered(method)
        return TrainingPlan(method, {name: kinds[name] for name in KINDS if kinds[name]})

    def set_dtypes(self, precision: str) -> None:
        """Set the dtypes of `Trainer`: frozen matrices in the precision, other weights in float32."""
        mine = {id(p) for p in self.trained}
        for p in self.unet.parameters():
            p.data = p.data.to(PRECISIONS[precision] if p.ndim > 1 and id(p) not in mine else torch.float32)

    def step(self, method: Method) -> Counter[str]:
        """What a step allocates: {kind: bytes at its peak}."""
        keep = method.accumulate > 1 or self.processes > 1  # DDP's gradients lie in buckets that stay
        key = method.precision, method.checkpointing, method.accumulate, method.shard, keep
        if key not in self.counts:
            known = [*self.frozen(), *self.trained]
            with self.around():
                self.counts[key] = step_peak(
                    lambda: self.loss(method), self.trained, known, PRECISIONS[method.precision], self.device,
                    keep=keep, drop=method.shard,
                )
        return self.counts[key]

    def loss(self, method: Method) -> Tensor:
        c, config = self.clips, self.unet.config
        clips = -(-c.clips // method.accumulate)
        shape = clips, config.in_channels, c.frames, c.height // self.factor, c.width // self.factor
        noisy, target = (torch.empty(shape, device="meta") for _ in range(2))
        text = torch.empty(clips, self.tokens, config.cross_attention_dim, device="meta")
        before, self.unet.gradient_checkpointing = self.unet.gradient_checkpointing, method.checkpointing
        try:
            prediction = self.unet(noisy, torch.empty(clips, device="meta"), text)
        finally:
            self.unet.gradient_checkpointing = before
        return F.mse_loss(prediction.float(), target)

    def gathered(self, method: Method) -> int:
        """Bytes of whole tensors in FSDP2: two blocks, parameters outside of blocks, and gradients of a block.

        Weights are gathered in the precision. Gradients are there in the precision, and in float32 for their sum.
        """
        width = PRECISIONS[method.precision].itemsize
        blocks = [[*block.parameters()] for block in self.unet.blocks()]
        inside, mine = {id(p) for block in blocks for p in block}, {id(p) for p in self.trained}
        outside = sum(p.numel() for p in self.unet.parameters() if id(p) not in inside)
        sizes = [sum(p.numel() for p in block) for block in blocks]
        learnt = max(sum(p.numel() for p in block if id(p) in mine) for block in blocks)
        two = max(a + b for a, b in zip(sizes, sizes[1:], strict=False))
        return width * (outside + two) + (width + 4) * learnt

    # Choosing ---------------------------------------------------------------------------------------------------------

    def possible(self) -> Iterator[Method]:
        """Every method, the fastest first. float32 is not among them: it takes more time and more memory."""
        bits = (False, True)
        pieces = [n for n in range(1, self.clips.clips + 1) if self.clips.clips % n == 0]
        found = [
            Method("bf16", checkpointing, n, eight, shard) for checkpointing, n, eight, shard
            in product(bits, pieces, bits, bits if self.processes > 1 else (False,)) if not (eight and shard)
        ]  # fmt: skip
        # Checkpointing costs one more forward, and pieces cost launches of kernels. 8 bits change the numbers.
        return iter(sorted(found, key=lambda m: 1.0 * m.checkpointing + 0.1 * (m.accumulate > 1) + 0.01 * m.accumulate
                           + 0.3 * m.eight_bits + 0.3 * m.shard))  # fmt: skip

    def choose(self, memory: str | float) -> TrainingPlan | None:
        """The fastest plan that fits into the memory (bytes, or a text like "24GiB"). None where none fits."""
        most = parse_memory(memory)
        return next((plan for plan in map(self.plan, self.possible()) if plan.peak <= most), None)

    def least(self) -> TrainingPlan:
        shards = (False, True) if self.processes > 1 else (False,)
        return min((self.plan(Method("bf16", True, self.clips.clips, not shard, shard)) for shard in shards),
                   key=lambda plan: plan.peak)  # fmt: skip

    def rows(self, accumulate: int = 1) -> list[TrainingPlan]:
        """The plans for float32 and bf16, and with each technique."""
        found = [Method(precision, checkpointing, accumulate) for precision in ("float32", "bf16")
                 for checkpointing in (False, True)]  # fmt: skip
        found.append(Method("bf16", True, accumulate, eight_bits=True))
        found += [Method("bf16", True, accumulate, shard=True)] * (self.processes > 1)
        return [self.plan(method) for method in found]


# Counting a step ------------------------------------------------------------------------------------------------------


def step_peak(
    loss: Callable[[], Tensor], trained: Iterable[Tensor], known: Iterable[Tensor], dtype: torch.dtype = torch.float32,
    device: str = "cuda", keep: bool = False, drop: bool = False,
) -> Counter[str]:
    """Bytes at the peak of forward and backward on `meta`, as if on `device`: gradients, copies, activations.

    known: tensors that exist before. dtype: of autocast, if it is not float32. keep: gradients exist from the start.
    drop: a gradient is freed as soon as it is computed.
    """
    live = Kinds(known)
    mode = TrainedOnMeta(device, dtype if dtype != torch.float32 else None, live)
    handles, trained = [], list(trained)

    def arrived(p: Tensor) -> None:
        if drop:
            p.grad = None
        elif p.grad is not None:
            live.tag(p.grad, "gradients")

    try:
        with mode, live:
            for p in (p for p in trained if p.requires_grad):
                p.grad = torch.empty_like(p) if keep and not drop else None
                if p.grad is not None:
                    live.tag(p.grad, "gradients")
                handles.append(p.register_post_accumulate_grad_hook(arrived))
            value = loss()
            mode.keeps = False  # autocast ends with the forward; with checkpointing, with each block
            mode.copies.clear()
            # Not value.backward(): it turns function modes off, and checkpoints run their forward in it.
            _engine_run_backward((value,), (torch.ones_like(value),), False, False, (), allow_unreachable=True,
                                 accumulate_grad=True)
    finally:
        for handle in handles:
            handle.remove()
        for p in trained:
            p.grad = None
    return live.at_peak


class Kinds(Live):
    """A `Live` that also counts the bytes at the peak by kind."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__(known)
        self.kinds: dict[int, str] = {}
        self.by_kind: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()

    def tag(self, value: Tensor, kind: str) -> None:
        storage = value.untyped_storage()
        if storage._cdata not in self.kinds:
            self.kinds[storage._cdata] = kind
            self.by_kind[kind] += storage.nbytes()

    def born(self, storage: torch.UntypedStorage) -> None:
        before = self.peak
        super().born(storage)
        if self.peak > before:
            rest = self.peak - self.by_kind.total()
            self.at_peak = self.by_kind + Counter({"activations": rest})

    def died(self, key: int, size: int) -> None:
        super().died(key, size)
        if (kind := self.kinds.pop(key, None)) is not None:
            self.by_kind[kind] -= size


class TrainedOnMeta(OnMeta):
    """An `OnMeta` with gradients and with autocast, which PyTorch lacks for `meta`."""

    def __init__(self, device: str, autocast: torch.dtype | None, live: Kinds):
        super().__init__(device)
        self.autocast, self.live, self.keeps = autocast, live, True
        self.copies: dict[int, Tensor] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.autocast is not None and function in LOWERED:
            args, kwargs = self.cast(args, self.autocast), {k: self.cast(v, self.autocast) for k, v in kwargs.items()}
        elif self.autocast is not None and function in WIDENED[self.device]:
            args, kwargs = self.cast(args, torch.float32), {k: self.cast(v, torch.float32) for k, v in kwargs.items()}
        if function is F.scaled_dot_product_attention:
            return FusedAttention.apply(*args[:3])
        if function is F.dropout and self.device == "cuda":
            return dropped(*args, **kwargs)
        if function in (torch.conv2d, F.conv2d, F.group_norm, torch.group_norm):  # these have gradients in PyTorch
            return function(*args, **kwargs)
        return super().__torch_function__(function, types, args, kwargs)

    def cast(self, x: Any, dtype: torch.dtype) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(self.cast(v, dtype) for v in x)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        if not (x.is_leaf and x.requires_grad and x.dtype == torch.float32):
            return x.to(dtype)
        if (copy := self.copies.get(id(x))) is None:  # a trained weight is cast once in a forward
            self.live.tag(copy := x.to(dtype), "copies")
            if self.keeps:
                self.copies[id(x)] = copy
        return copy


# What autocast runs in its dtype, and what it runs in float32, of the functions that these networks call.
LOWERED = {F.linear, F.conv2d, torch.conv2d, F.conv3d, torch.conv3d, torch.matmul, Tensor.matmul, torch.bmm,
           F.scaled_dot_product_attention}  # fmt: skip
WIDENED: dict[str, set[Any]] = {
    "cuda": {F.group_norm, torch.group_norm, F.layer_norm, torch.layer_norm, F.mse_loss},
    "cpu": {F.mse_loss},
}


class FusedAttention(torch.autograd.Function):
    """Keeps what PyTorch's fused backends keep: q, k, v, the result, and one number for each row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, length, _ = q.shape
        y = torch.empty(b, length, h, v.shape[-1], dtype=q.dtype, device=q.device).transpose(1, 2)
        ctx.save_for_backward(q, k, v, y, torch.empty(b, h, length, device=q.device))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def dropped(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout as on CUDA: it keeps one byte for each number."""
    return torch.native_dropout(x, p, True)[0] if training and p else x
