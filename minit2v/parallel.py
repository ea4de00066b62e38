"""Several processes train one network: `torchrun --nproc-per-node N`, on one machine or several.

Every process takes its rows of a global batch, and all do the same step. Gradients are summed over the processes. So
a loss is the sum over the rows, divided by the global batch. Then any number of processes makes the same step.

    world = parallel.world()                                     # one process without torchrun
    network = world.replicate(unet)                              # or world.shard(unet): each has a part of the weights
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

PATIENCE = 1800.0  # seconds that a process usually waits for the others
WEEK = 7 * 24 * 3600.0  # where the others may work for long
PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def of_environment() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine), as torchrun sets them. Without torchrun (0, 1, 0)."""
    found = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    return tuple(map(int, found)) if all(map(str.isdecimal, found)) else (0, 1, 0)  # type: ignore[return-value]


def own_device(device: torch.device) -> torch.device:
    """The device of this process. If `device` has no number, it is the accelerator of the local rank.

    ValueError where the machine has fewer accelerators than processes.
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
    """Connect the processes that torchrun has started: by NCCL on CUDA, by gloo on CPUs.

    device: of this process. None: the accelerator of its local rank, or the CPU.
    patience: a process fails after it has waited so many seconds for the others.
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
    """A random word that the first process gives to all others.

    After a restart torchrun's store still has the addresses of killed processes. A process that reads an old address
    waits for a dead process. So all keys of this start begin with a new word.
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
    """All processes, seen from one of them. With one process, the calls need no others and return at once."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    waiting: Any = None  # the gloo group of `barrier`

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and messages for all processes."""
        return self.rank == 0

    def share(self, rows: Sequence[Any]) -> list[Any]:
        """This process's rows of a global batch. ValueError where the rows cannot be shared equally."""
        if len(rows) % self.size:
            raise ValueError(f"the batch must be a multiple of the {self.size} processes, not {len(rows)}")
        count = len(rows) // self.size
        return list(rows[self.rank * count : (self.rank + 1) * count])

    # Synchronisation and messages ------------------------------------------------------------------------------------

    def barrier(self, name: str, timeout: float = PATIENCE) -> None:
        """Wait for all processes. After `timeout` seconds RuntimeError gives the name and the missing processes."""
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
        """What `make` returns on the first process. The others do not call it. If it raises an error, all raise it."""
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
        """Disconnect. All processes must be done."""
        if distributed.is_initialized():
            distributed.destroy_process_group()

    # The network -----------------------------------------------------------------------------------------------------

    def replicate(self, network: nn.Module, unused: bool = False) -> nn.Module:
        """Every process has the whole network. Gradients are averaged in backward (DDP, arXiv:2006.15704).

        Returns a wrapper of `network`. All processes get the parameters of the first one. unused: some steps do not use
        all parameters.
        """
        if self.size == 1:
            return network
        device = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=device, gradient_as_bucket_view=True,
                                                   find_unused_parameters=unused)

    def shard(self, network: nn.Module, precision: str = "float32", offload: bool = False) -> nn.Module:
        """Each process has a part of every weight, gradient and optimizer state (FSDP2). Returns the network.

        The parameters of the network become DTensors, so make the optimizer afterwards.
        precision: "bf16" or "fp16" computes in 16 bits. Weights, gradients and their sums stay float32.
        offload: the parts are kept in the CPU's memory.
        """
        if not distributed.is_initialized():
            return network
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        dtype = PRECISIONS[precision]
        policy = MixedPrecisionPolicy(dtype, torch.float32) if dtype else MixedPrecisionPolicy()
        how = {"mesh": init_device_mesh(self.device.type, (self.size,)), "mp_policy": policy,
               "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy()}  # fmt: skip
        # It warns of views that code could write to. These networks change nothing in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        for block in network.blocks():  # type: ignore[operator]
            fully_shard(block, **how)
        return fully_shard(network, **how)

    @contextmanager
    def accumulating(self, network: nn.Module, last: bool) -> Iterator[None]:
        """Wrap forward and backward of a piece of the batch in it. Only the last piece exchanges gradients."""
        if isinstance(network, nn.parallel.DistributedDataParallel) and not last:
            with network.no_sync():
                yield
            return
        if is_sharded(network):
            network.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield

    def backward(self, loss: Tensor, network: nn.Module) -> None:
        """Run backward. The gradients of all processes then add up to that of the global batch.

        DDP and FSDP take the mean over the processes, so the loss is scaled by their number.
        """
        averages = isinstance(network, nn.parallel.DistributedDataParallel) or is_sharded(network)
        (loss * self.size if averages else loss).backward()

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter] | nn.Module) -> None:
        """Sum the gradients over the processes in one message.

        For few parameters (LoRAs), and for parameters that not every step uses. One without a gradient on all processes
        keeps None. Nothing is done for networks of `replicate` and `shard`, which do it in backward.
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
        """Scale all gradients, also sharded ones, so that their norm is at most `most`. Returns the norm before."""
        parameters = [p for p in parameters if p.grad is not None]
        if not any(hasattr(p, "to_local") for p in parameters):
            return float(nn.utils.clip_grad_norm_(parameters, most))
        gradients = [local(p.grad) for p in parameters]  # each process has other numbers
        square = torch.stack(torch._foreach_norm(gradients)).square().sum()
        distributed.all_reduce(square)
        norm = square.sqrt()
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
        return float(norm)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors, on the CPU of the first process. The others get an empty dict.

        All processes must call it with the same names in the same order.
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
        """Give the first process a whole copy of a sharded network, as plain parameters, to save it.

        Afterwards the network cannot run any more. All processes must call it.
        """
        sharded = [module for module in network.modules() if is_sharded(module)]
        for module in sharded:
            module.reshard()  # type: ignore[operator]  # else `state_dict` would do it, and bring the parts back
        places = [(module, name) for module in network.modules() for name in module._parameters]
        whole = self.gather({str(n): x for n, (module, name) in enumerate(places)
                             if (x := getattr(module, name)) is not None})  # fmt: skip
        for n, (module, name) in enumerate(places):
            if str(n) in whole:
                setattr(module, name, nn.Parameter(whole[str(n)], requires_grad=False))
        for module in sharded:  # FSDP2 gave it a class with another name, which would stand in the file
            module.__class__ = type(module).__mro__[2]

    # Checkpoints of sharded networks ---------------------------------------------------------------------------------

    def save_sharded(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Each process writes its part of the tensors. `folder` appears whole or not at all, also after a kill."""
        from torch.distributed import checkpoint

        part = folder.with_name(f"{folder.name}.part")
        if self.is_first:
            shutil.rmtree(part, ignore_errors=True)  # left by a killed save
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
        """The tensors that any number of processes has saved.

        like: name -> a tensor that is sharded as the loaded one should be. None: each process gets the whole tensor.
        ValueError where the folder is not whole. Do not load folders of strangers: PyTorch reads the list of tensors
        with pickle.
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
        except Exception as error:  # a damaged file can raise any error
            raise ValueError(f"{folder} is not a whole checkpoint ({first_line(error)})") from error
        return tensors


def local(x: Tensor) -> Tensor:
    """The part of a sharded tensor that is here. Writing to it changes the tensor. Other tensors are returned."""
    return x.to_local() if hasattr(x, "to_local") else x  # type: ignore[operator]  # importing DTensor takes a second


def is_sharded(network: nn.Module) -> bool:
    """Whether `World.shard` has sharded this network."""
    if not distributed.is_available() or not distributed.is_initialized():  # importing FSDP2 takes seconds
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(network, FSDPModule)


@contextmanager
def _quiet() -> Iterator[None]:
    """In the block, PyTorch does not warn that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is (disabled|unavailable).*")
        yield


def sync(folder: Path) -> None:
    """Write the names in a folder to the disk. Windows cannot do it."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
