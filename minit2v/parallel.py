"""Several processes train one network: `torchrun --nproc-per-node N`, on one machine or several.

Every process takes its rows of a global batch, and all make the same step. Gradients are summed over the processes.
So a loss is summed over the rows and divided by the size of the global batch. Then the step does not depend on the
number of processes.

    world = parallel.world()                                     # one process, if torchrun did not start this one
    network = world.replicate(unet)                              # or world.shard(unet): a part of the weights on each
    for k, piece in enumerate(pieces):                           # of world.share(batch)
        with world.accumulating(network, last=k == len(pieces) - 1):
            world.backward(loss(network(...)) / len(batch), network)
    world.sum_gradients(network)
    norm = world.clip(parameters, 1.0)
"""

import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from minit2v_convert.stream import first_line

PATIENCE = 1800.0  # seconds that a process waits for the others, by default
WEEK = 7 * 24 * 3600.0  # seconds; for waits during which the others may work for long
PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def of_environment() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) as torchrun sets them. (0, 1, 0) without torchrun."""
    found = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    return tuple(map(int, found)) if all(map(str.isdecimal, found)) else (0, 1, 0)  # type: ignore[return-value]


def own_device(device: torch.device) -> torch.device:
    """The device of this process. If `device` has no index, it is the accelerator with the process's local rank.

    Raises ValueError if there are fewer accelerators than processes.
    """
    _, size, local = of_environment()
    if size == 1 or device.type == "cpu":
        return device
    there = torch.accelerator.device_count()
    if device.index is None:
        if local >= there:
            raise ValueError(f"process {local + 1} of this machine finds {there} device{'s' * (there > 1)}: start one "
                             f"process for each (--nproc-per-node {there})")  # fmt: skip
        device = torch.device(device.type, local)
    torch.accelerator.set_device_index(device.index)
    return device


def world(device: torch.device | str | None = None, patience: float = PATIENCE) -> "World":
    """Connects the processes that torchrun has started: with NCCL on CUDA, with gloo on CPUs.

    device: of this process. None is the accelerator of its local rank, or the CPU.
    patience: seconds that a process waits for the others before it fails.
    Raises ValueError if there are fewer accelerators than processes, and RuntimeError if a process does not come.
    """
    rank, size, _ = of_environment()
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = own_device(torch.device(device or "cpu"))
    if size == 1 and "RANK" not in os.environ:
        return World(device=device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if not distributed.is_initialized():
        store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(seconds=patience)))
        store = distributed.PrefixStore(_agree(store, rank, size, patience), store)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size,
                                       timeout=timedelta(seconds=patience))
    waiting = distributed.new_group(backend="gloo", timeout=timedelta(seconds=patience))
    return World(rank, size, device, waiting)


def _agree(store: distributed.Store, rank: int, size: int, patience: float) -> str:
    """A random word of the first process, which all others receive.

    After a restart, torchrun's store still has the addresses of killed processes. A process that reads an old address
    would wait for ever. So all keys of this start begin with the new word.
    """
    me = secrets.token_hex(8)
    if rank:
        store.set(f"minit2v {rank}", me)
        word = store.get(f"minit2v answers {me}").decode()
        store.set(f"minit2v {word} {rank}", "")
        return word
    end, answered = time.monotonic() + patience, set()
    while left := [n for n in range(1, size) if not store.check([f"minit2v {me} {n}"])]:
        if time.monotonic() > end:
            missing = ", ".join(str(n + 1) for n in left)
            raise RuntimeError(f"these of {size} processes did not connect within {patience:g} seconds: {missing}")
        for n in left:
            if store.check([f"minit2v {n}"]) and (asked := store.get(f"minit2v {n}").decode()) not in answered:
                store.set(f"minit2v answers {asked}", me)
                answered.add(asked)
        time.sleep(0.01)
    return me


@dataclass(frozen=True)
class World:
    """All processes, as one of them sees them. With a single process, its methods do not communicate."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    waiting: Any = None  # the gloo group of `barrier`

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and messages for all processes."""
        return self.rank == 0

    def share(self, rows: Sequence[Any]) -> list[Any]:
        """This process's rows of a global batch. Raises ValueError if they cannot be shared evenly."""
        if len(rows) % self.size:
            raise ValueError(f"the batch must be a multiple of the {self.size} processes, not {len(rows)}")
        count = len(rows) // self.size
        return list(rows[self.rank * count : (self.rank + 1) * count])

    # Synchronisation and messages ------------------------------------------------------------------------------------

    def barrier(self, name: str, timeout: float = PATIENCE) -> None:
        """Waits for all processes. Raises RuntimeError after `timeout` seconds, with `name` and the missing ones."""
        if self.size == 1:
            return
        try:
            distributed.monitored_barrier(self.waiting, timedelta(seconds=timeout), wait_all_ranks=True)
        except RuntimeError as error:
            why = " ".join(str(error).split())
            raise RuntimeError(f"process {self.rank + 1} of {self.size} waited in vain for the others at {name!r} "
                               f"({why})") from error  # fmt: skip

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total, group=self.waiting)
        return total.tolist()

    def from_first(self, make: Callable[[], Any]) -> Any:
        """The result of `make`, which only the first process calls. Its error is raised in all processes."""
        if self.size == 1:
            return make()
        found: list[Any] = [None, None]
        if self.is_first:
            try:
                found[0] = make()
            except Exception as error:
                found[1] = error
        distributed.broadcast_object_list(found, group=self.waiting)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def close(self) -> None:
        """Disconnects from the other processes. All must have finished."""
        if distributed.is_initialized():
            distributed.destroy_process_group()

    # The network -----------------------------------------------------------------------------------------------------

    def replicate(self, network: nn.Module, unused: bool = False) -> nn.Module:
        """Data parallelism (DDP, arXiv:2006.15704): every process has the whole network. Backward sums the gradients.

        The result wraps `network`. Its parameters become those of the first process.
        unused: True if some steps do not use all parameters.
        """
        if self.size == 1:
            return network
        device = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=device, gradient_as_bucket_view=True,
                                                   find_unused_parameters=unused)

    def shard(self, network: nn.Module, precision: str = "float32", offload: bool = False) -> nn.Module:
        """Sharding (FSDP2): each process has a part of every weight, gradient and optimizer state. Returns the network.

        The network is changed: its parameters become DTensors. So create the optimizer afterwards. Blocks are gathered
        one by one.
        precision: "bf16" or "fp16" computes in this dtype. Weights, gradients and their sums stay in float32.
        offload: keep the parts in the CPU's memory while they are not used.
        """
        if not distributed.is_initialized():
            return network
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        dtype = PRECISIONS[precision]
        policy = MixedPrecisionPolicy(dtype, torch.float32) if dtype else MixedPrecisionPolicy()
        how = {"mesh": init_device_mesh(self.device.type, (self.size,)), "mp_policy": policy,
               "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy()}  # fmt: skip
        # FSDP2 warns about views that could be changed in place. The networks do not do that.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        for block in network.blocks():  # type: ignore[operator]
            fully_shard(block, **how)
        return fully_shard(network, **how)

    @contextmanager
    def accumulating(self, network: nn.Module, last: bool) -> Iterator[None]:
        """A context for forward and backward of one piece of the batch. Only the last piece sends gradients."""
        if isinstance(network, nn.parallel.DistributedDataParallel) and not last:
            with network.no_sync():
                yield
            return
        if is_sharded(network):
            network.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield

    def backward(self, loss: Tensor, network: nn.Module) -> None:
        """Runs backward, so that gradients become those of the global batch. It undoes the mean of DDP and FSDP."""
        averages = isinstance(network, nn.parallel.DistributedDataParallel) or is_sharded(network)
        (loss * self.size if averages else loss).backward()

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter] | nn.Module) -> None:
        """Sums the gradients over the processes in one message. DDP and FSDP networks did it in backward already.

        This suits few parameters (LoRAs), also if a step does not use all of them. A parameter without a gradient on
        all processes keeps none.
        """
        if isinstance(parameters, nn.Module):
            if isinstance(parameters, nn.parallel.DistributedDataParallel) or is_sharded(parameters):
                return
            parameters = parameters.parameters()
        trained = [p for p in parameters if p.requires_grad]
        if self.size == 1 or not trained:
            return
        for dtype in dict.fromkeys(p.dtype for p in trained):
            group = [p for p in trained if p.dtype == dtype]
            used = torch.tensor([p.grad is not None for p in group], dtype=dtype, device=group[0].device)
            flat = torch.cat([used, *(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                                      for p in group)])  # fmt: skip
            distributed.all_reduce(flat)
            sums = flat[len(group) :].split([p.numel() for p in group])
            for p, total, count in zip(group, sums, flat[: len(group)].tolist(), strict=True):
                p.grad = total.view_as(p).clone() if count else None

    @torch.no_grad()
    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> float:
        """Scales all gradients so that their norm is at most `most`. Returns the norm before. Also for sharded ones."""
        parameters = [p for p in parameters if p.grad is not None]
        if not any(hasattr(p, "to_local") for p in parameters):
            return float(nn.utils.clip_grad_norm_(parameters, most))
        gradients = [local(p.grad) for p in parameters]  # each number is on exactly one process
        square = torch.stack(torch._foreach_norm(gradients)).square().sum()
        distributed.all_reduce(square)
        norm = square.sqrt()
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
        return float(norm)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors, on the CPU of the first process. The other processes get an empty dict.

        All processes must call it, with the same names in the same order.
        """
        whole: dict[str, Tensor] = {}
        for name, x in tensors.items():
            x = x.detach()
            x = x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[operator]
            if self.is_first:
                whole[name] = x.cpu()
        return whole

    @torch.no_grad()
    def make_whole(self, network: nn.Module) -> None:
        """Gives the first process the whole of a sharded network, to save it. The network cannot run any more.

        All processes must call it.
        """
        sharded = [module for module in network.modules() if is_sharded(module)]
        for module in sharded:
            module.reshard()  # type: ignore[operator]  # otherwise `state_dict` would restore the parts
        places = [(module, name) for module in network.modules() for name in module._parameters]
        whole = self.gather({str(n): x for n, (module, name) in enumerate(places)
                             if (x := getattr(module, name)) is not None})  # fmt: skip
        for n, (module, name) in enumerate(places):
            if str(n) in whole:
                setattr(module, name, nn.Parameter(whole[str(n)], requires_grad=False))
        for module in sharded:  # undo FSDP2's change of the class, because its name is written into files
            module.__class__ = type(module).__mro__[2]

    # Checkpoints of sharded networks ---------------------------------------------------------------------------------

    def save_sharded(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Each process writes its part of the tensors. `folder` appears complete or not at all."""
        from torch.distributed import checkpoint

        part = folder.with_name(f"{folder.name}.part")
        if self.is_first:
            shutil.rmtree(part, ignore_errors=True)  # left by a killed process
            part.mkdir(parents=True)
        self.barrier(f"saving {folder.name}")
        with _quiet():
            checkpoint.save(dict(tensors), checkpoint_id=part)
        self.barrier(f"parts of {folder.name}")
        if self.is_first:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
            sync(folder.parent)
        self.barrier(f"name of {folder.name}")

    def load_sharded(self, folder: Path, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
        """Loads what `save_sharded` has saved, with any number of processes.

        Each tensor is sharded like the tensor `like(name)`. If that is None, every process has the whole tensor.
        Raises ValueError if the folder is not complete. Load only your own folders, because PyTorch reads the list of
        tensors with pickle.
        """
        from torch.distributed import checkpoint

        try:
            stored = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
            tensors = {}
            for name, about in stored.items():
                near, dtype = like(name), about.properties.dtype
                fits = near is not None and near.shape == about.size
                tensors[name] = torch.zeros_like(near, dtype=dtype) if fits else torch.zeros(about.size, dtype=dtype)
            with _quiet():
                checkpoint.load(tensors, checkpoint_id=folder)
        except Exception as error:  # a broken file can cause any error
            raise ValueError(f"{folder} is not a complete checkpoint ({first_line(error)})") from error
        return tensors


def local(x: Tensor) -> Tensor:
    """This process's part of a sharded tensor, as a view. Other tensors are returned unchanged."""
    return x.to_local() if hasattr(x, "to_local") else x  # type: ignore[operator]  # DTensor: a second to import


def is_sharded(network: nn.Module) -> bool:
    """Whether `World.shard` has sharded the network."""
    if not distributed.is_available() or not distributed.is_initialized():  # FSDP2's import takes seconds
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(network, FSDPModule)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's warning about a single process, which may be intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is (disabled|unavailable).*")
        yield


def sync(folder: Path) -> None:
    """Flushes the names in a folder to the disk, if the system can do this (Windows cannot)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
