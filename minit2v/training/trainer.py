"""One trainer for both families: `UNet3DConditionModel` and `UNetMotionModel`, whole, in parts, or by LoRAs.

    trainer = Trainer(pipe, data, Recipe(data=("clips",), out="runs/mine"))
    trainer.run()                                   # resumes where checkpoints are; `trainer.step()` is one step

A batch is a function of the seed and the step alone, and so is all that is random. So a checkpoint holds no random
state, and a run that was killed goes on exactly as if it had not been.
"""

import hashlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.blocks import TemporalConv
from ..models.unet_motion import UNetMotionModel
from ..parallel import WEEK, World, is_sharded, local
from . import checkpoints
from .logs import Log
from .objective import Objective, choose_frames, generators, happens
from .recipe import LORAS, Recipe
from .trainable import TrainedLoRA, add_lora, add_motion_director, choose, without_time
from .validation import Validation

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PATIENCE = 5  # steps in a row whose loss or gradient is not finite, before the run stops
GROWTH = 1000  # good steps after which fp16's loss scale doubles
NUMBERS = ("done", "seconds", "bad", "skipped", "scale", "good")  # what a checkpoint has beside tensors


class Piece(NamedTuple):
    """Rows that go through the network together. latents (b c f h w), text (b l d); numbers: of the samples, global."""

    latents: Tensor
    text: Tensor
    sources: Sequence[str]
    numbers: Sequence[int]


class Average:
    """A moving average of the weights in float32, which samples better than they do.

    decay: of old values at a step, at the beginning less: (1 + n) / (10 + n) after n steps. 0: there is no average.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.parameters, self.decay, self.count = list(parameters), decay, 0
        self.values = [p.detach().clone() for p in self.parameters] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        if self.decay:
            decay = min(self.decay, (1 + self.count) / (10 + self.count))
            # Of sharded weights the parts that are here: DTensors of a large network take minutes at the first step.
            torch._foreach_lerp_(*(list(map(local, xs)) for xs in (self.values, self.parameters)), 1 - decay)
            self.count += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block, the parameters have the values of the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for p, value in zip(self.parameters, self.values, strict=False):
            kept = p.detach().clone()
            p.copy_(value)
            value.copy_(kept)


class Trainer:
    """A pipeline whose UNet is trained on data, as a recipe says. It takes up the newest checkpoint in `recipe.out`.

    pipe: its networks are used as they are: what is trained changes, and frozen weights go to the precision.
    data: a `Data`, or anything with its `batch(step, count)`, `load(items)` and `fingerprint`; prior: another one, of
    what is not to be forgotten. world: of `minit2v.parallel.world()`. say: where lines for people go.
    Raises ValueError where the recipe does not fit the model, or the folder is that of another run.
    """

    def __init__(
        self,
        pipe: Any,
        data: Any,
        recipe: Recipe,
        world: World | None = None,
        prior: Any = None,
        say: Callable[[str], None] = print,
        resume_anyway: bool = False,
    ):
        self.pipe, self.data, self.prior, self.world, self._say = pipe, data, prior, world or World(), say
        self.unet = pipe.unet
        self.device = self.unet.device
        family = "UNetMotionModel" if isinstance(self.unet, UNetMotionModel) else "UNet3DConditionModel"
        self.recipe = recipe = recipe.filled(family, clips=len(data), cuda=self.device.type == "cuda")
        if recipe.prior_rows and prior is None:
            raise ValueError("the recipe has a prior_share: give the Trainer prior data, too")
        if recipe.batch % (self.world.size * recipe.accumulate):
            raise ValueError(f"batch {recipe.batch} does not divide among {self.world.size} processes in "
                             f"{recipe.accumulate} pieces each")  # fmt: skip
        self.out = Path(recipe.out)
        pipe.restore()  # the plain networks, not the fast path: what is trained must be what runs
        motion = family == "UNetMotionModel" and recipe.train != "image"
        self.objective = Objective(
            pipe.scheduler, objective=recipe.objective, betas=recipe.betas, motion=motion, zero_snr=recipe.zero_snr,
            noise_offset=recipe.noise_offset, offset_per=recipe.offset_per, min_snr=recipe.min_snr,
            timesteps=recipe.timesteps, high_share=recipe.high_share, high_from=recipe.high_from,
        )  # fmt: skip
        pipe.scheduler = self.objective.scheduler_for(pipe.scheduler)
        about = {"model": digest_of_some(self.unet), "data": getattr(data, "fingerprint", None),
                 "prior": getattr(prior, "fingerprint", None)}  # fmt: skip
        self._prepare()
        self._spread()
        self.optimizer = make_optimizer(self.groups, recipe, self.device)
        self.average = Average(self.parameters, recipe.ema or 0.0)
        # The weights of step 0, also where a run is resumed: what the model said before it was trained.
        self.first = Average(self.parameters, 1.0) if recipe.prior_rows and recipe.prior_target == "model" else None
        self.done, self.seconds, self.bad, self.skipped = 0, 0.0, 0, 0
        self.scale, self.good = (2.0**16 if recipe.precision == "fp16" else 1.0), 0
        self.world.from_first(lambda: checkpoints.claim(self.out, recipe, about, resume_anyway))
        if (path := self.world.from_first(lambda: checkpoints.newest(self.out))) is not None:
            self.load(path)
        self.log = Log(self.out, self.done) if self.world.is_first else None
        alone = self.world.is_first or is_sharded(self.unet)  # of sharded weights nobody has all
        self.validation = Validation(self) if recipe.validate_every and alone else None

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        with tqdm.external_write_mode():
            self._say(text)

    # What is trained -------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Choose what is trained: `trained`, names and parameters, and `loras`; make the network ready for it.

        Trained weights are float32 or wider, also where the network computes in 16 bits: small steps would be lost.
        Frozen ones take the precision where they are in no result; else the model would be saved with rounded weights.
        """
        recipe, unet = self.recipe, self.unet
        self.loras: dict[str, TrainedLoRA] = {}
        _, generator = generators(recipe.seed, "lora", 0)
        assert recipe.rate is not None and recipe.spatial_rate is not None
        if recipe.train == "motiondirector":
            spatial, temporal = add_motion_director(unet, recipe.rank, recipe.alpha, recipe.dropout, generator)
            self.loras = {"spatial": spatial, "temporal": temporal}
        elif recipe.train in LORAS:
            targets = recipe.targets or ("motion" if recipe.train == "motion-lora" else "both",)
            self.loras = {"lora": add_lora(unet, targets, recipe.rank, recipe.alpha, recipe.dropout, generator)}
        else:
            part = "spatial" if recipe.train == "image" else recipe.train
            self.trained = choose(unet, part, recipe.targets)
        if self.loras:
            self.trained = [(f"{kind}.{path}.{side}", getattr(branch, side)) for kind, lora in self.loras.items()
                            for path, branch in lora.layers.items() for side in ("down", "up")]  # fmt: skip
        for name, p in self.trained:
            if torch.finfo(p.dtype).bits < 32:
                raise ValueError(f"{name} is {p.dtype}: load the model in float32; precision says what it computes in")
        if recipe.precision != "float32" and (self.loras or recipe.train == "motion"):
            for p in unet.parameters():
                if not p.requires_grad and p.ndim > 1:  # norms and biases stay exact: they are small
                    p.data = p.data.to(DTYPES[recipe.precision or "float32"])
        for module in unet.modules():
            if isinstance(module, TemporalConv):
                module.dropout = recipe.temporal_dropout or 0.0
        if recipe.checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()

    def _spread(self) -> None:
        """Have the processes share the network, and say what the optimizer gets: `parameters`, and `groups` with rates.

        A LoRA is replicated, and its gradients are summed in one message; a network that is trained itself is wrapped
        by DDP, or sharded.
        """
        recipe, unet = self.recipe, self.unet
        self.network: nn.Module = unet
        if recipe.parallel == "fsdp":
            if recipe.optimizer == "adamw8bit":
                raise ValueError("optimizer 'adamw8bit' does not go with parallel 'fsdp'")
            places = {id(p): name for name, p in unet.named_parameters()}
            self.network = self.world.shard(unet, recipe.precision or "float32")
            found = dict(unet.named_parameters())
            self.trained = [(name, found[places[id(p)]]) for name, p in self.trained]
        elif not self.loras and not self.has_stills:
            self.network = self.world.replicate(unet)
        self.parameters = [p for _, p in self.trained]
        rates = {"spatial": recipe.spatial_rate}
        self.groups = [{"params": lora.parameters(), "rate": rates.get(kind, recipe.rate)}
                       for kind, lora in self.loras.items()] or [{"params": self.parameters, "rate": recipe.rate}]

    @property
    def has_stills(self) -> bool:
        """Whether some steps use the spatial layers alone: DDP would wait for the others' gradients."""
        return self.recipe.stills == "spatial" and any(
            clip.bucket.frames == 1 for data in (self.data, self.prior) for clip in getattr(data, "clips", ()))

    # One step --------------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """One step of the optimizer on the batch of this step. Returns its loss, gradient norm and learning rate."""
        rng, _ = generators(self.recipe.seed, f"dropout {self.world.rank}", self.done)
        torch.manual_seed(rng.getrandbits(60))  # of dropout
        self.optimizer.zero_grad(set_to_none=True)
        self.pieces = self.batch(self.done)
        losses = []
        for n, piece in enumerate(self.pieces):
            with self.world.accumulating(self.network, last=n == len(self.pieces) - 1):
                losses.append(self.backward(piece))
        if self.network is self.unet:
            self.world.sum_gradients(self.network)
        for p in self.parameters:
            if p.grad is not None and self.scale != 1:
                p.grad /= self.scale
        norm = self.world.clip(self.parameters, self.recipe.clip)
        (loss,) = self.world.sum([float(sum(map(torch.sum, losses))) / self.recipe.batch])
        factor = self.recipe.rate_at(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            self.average.update()
            self.bad, self.good = 0, self.good + 1
            if self.recipe.precision == "fp16" and self.good % GROWTH == 0:
                self.scale *= 2
        else:
            self.skip(loss, losses)
        self.done += 1
        return {"loss": loss, "norm": norm, "rate": self.optimizer.param_groups[0]["lr"], "skipped": self.skipped}

    def batch(self, step: int) -> list[Piece]:
        """This process's rows of a step's batch, in as many pieces as the recipe accumulates; the prior's at the end.

        Rows of the data and of the prior set go through the network together where they have one size.
        """
        recipe = self.recipe
        sets = [(self.data, recipe.batch - recipe.prior_rows), (self.prior, recipe.prior_rows)]
        rows, first = [], 0
        for data, count in sets:
            if count:
                items = data.batch(step, count)
                rows.append((data, self.world.share(list(zip(items, range(first, first + count), strict=True)))))
            first += count
        pieces: list[Piece] = []
        for k in range(recipe.accumulate):
            found: list[Piece] = []
            for data, mine in rows:
                if part := mine[k :: recipe.accumulate]:
                    batch = data.load([item for item, _ in part])
                    numbers = [step * recipe.batch + row for _, row in part]
                    found.append(Piece(batch.latents, batch.text, batch.sources, numbers))
            pieces += joined(found)
        return pieces

    def backward(self, piece: Piece) -> Tensor:
        """Add the gradients of a piece to those that are there, and return its losses (b,).

        They are those of the sum over the rows divided by the whole batch: however it is cut, the step is the same.
        """
        if self.recipe.train == "motiondirector":
            return self.backward_director(piece)
        latents, text = self.placed(piece)
        with self.layers_for(latents):
            noisy, t, target, _ = self.objective.noised(latents, self.recipe.seed, piece.numbers)
            if self.first is not None:
                target = self.kept(noisy, t, text, target, piece.numbers)
            with self.autocast():
                prediction = self.network(noisy, t, text)
            losses = self.objective.loss(prediction, target, t)
            self.world.backward(losses.sum() * (self.scale / self.recipe.batch), self.network)
        return losses.detach()

    @torch.no_grad()
    def kept(self, noisy: Tensor, t: Tensor, text: Tensor, target: Tensor, numbers: Sequence[int]) -> Tensor:
        """The target, in rows of the prior set what the model said before it was trained: (b c f h w).

        Learning without forgetting (Li and Hoiem 2016, arXiv:1606.09282). Unlike the noise of a clip, it is what the
        model says exactly: nothing pulls on what is right already.
        """
        rows = [r for r, n in enumerate(numbers) if n % self.recipe.batch >= self.recipe.batch - self.recipe.prior_rows]
        if not rows or self.first is None:
            return target
        self.unet.eval()
        with self.first.in_place(), self.autocast():
            said = self.unet(noisy[rows], t[rows], text[rows])
            if is_sharded(self.unet):
                self.unet.reshard()  # the root keeps whole weights after a forward: they would be the first ones still
        self.unet.train()
        target = target.clone()
        target[rows] = said.to(target)
        return target

    def backward_director(self, piece: Piece) -> Tensor:
        """MotionDirector's two paths (Zhao et al. 2023, arXiv:2310.08465), row by row.

        The spatial path, of four rows in five: one frame of the clip teaches the spatial LoRA what it looks like. The
        temporal path, of every row: the whole clip teaches the temporal LoRA, beside the spatial one of such a row.
        Each path ends with its backward before the other begins, so only one keeps its activations.
        """
        latents, text = self.placed(piece)
        spatial, temporal = self.loras["spatial"], self.loras["temporal"]
        seed, losses = self.recipe.seed, []
        for row, number in enumerate(piece.numbers):
            look = happens(seed, "spatial path", number, 0.8)
            noisy, t, target, _ = self.objective.noised(latents[row : row + 1], seed, [number])
            frames = noisy.shape[2]
            total = noisy.new_zeros(1)
            if look:
                i = int(choose_frames(seed, "spatial path", [number], frames))
                spatial.use(True)
                temporal.use(False)
                with without_time(self.unet):
                    total = total + self._one(noisy[:, :, [i]], t, text[row : row + 1], target[:, :, [i]])
            spatial.use(look, trained=False)
            temporal.use(True)
            if frames > 1:
                anchor = choose_frames(seed, "anchor", [number], frames)
                total = total + self._one(noisy, t, text[row : row + 1], target, anchor)
            losses.append(total)
            spatial.use(True)
        return torch.cat(losses)

    def _one(self, noisy: Tensor, t: Tensor, text: Tensor, target: Tensor, anchor: Tensor | None = None) -> Tensor:
        with self.autocast():
            prediction = self.network(noisy, t, text)
        if anchor is None:
            losses = self.objective.loss(prediction, target, t)
        else:
            losses = self.objective.motion_loss(prediction, target, t, anchor)
        self.world.backward(losses.sum() * (self.scale / self.recipe.batch), self.network)
        return losses.detach()

    def placed(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Latents and text on the device, in the dtype of the trained weights."""
        dtype = self.parameters[0].dtype
        return piece.latents.to(self.device, dtype), piece.text.to(self.device, dtype)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision: matrix products in 16 bits, where the recipe says so."""
        if self.recipe.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.recipe.precision or "float32"])

    def layers_for(self, latents: Tensor) -> AbstractContextManager[None]:
        """A still goes through the spatial layers alone, if the recipe does not say otherwise."""
        return without_time(self.unet) if latents.shape[2] == 1 and self.recipe.stills == "spatial" else nullcontext()

    def skip(self, loss: float, losses: Sequence[Tensor]) -> None:
        """Say what is not finite, and leave the weights alone. RuntimeError at the fifth time in a row.

        In fp16 a gradient can be too large for the numbers: the scale of the loss is halved, and that is not a fault.
        """
        if math.isfinite(loss) and self.scale > 1:
            self.scale, self.good = self.scale / 2, 0
            return
        self.bad, self.skipped = self.bad + 1, self.skipped + 1
        names = [name for name, p in self.trained if p.grad is not None and not torch.isfinite(local(p.grad)).all()]
        sources = [source for piece in self.pieces for source in piece.sources]
        files = [source for source, x in zip(sources, torch.cat(list(losses)).tolist(), strict=True)
                 if not math.isfinite(x)] or sources  # fmt: skip
        what = "its loss" if not math.isfinite(loss) else "a gradient"
        text = f"step {self.done}: {what} is not finite; files: {', '.join(dict.fromkeys(files))}; first tensor: " + (
            names[0] if names else "none")
        self.say(f"{text}. The step is skipped")
        if self.bad >= PATIENCE:
            last = max(checkpoints.all_of(self.out).items(), default=(None, None))[1]
            raise RuntimeError(f"{text}. {self.bad} steps in a row are not finite, so the run stops; the last good "
                               f"checkpoint is {last or 'none'}")  # fmt: skip

    # The run ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All steps that are left, with checkpoints, logs and validations.

        SIGTERM and Ctrl-C end it after the step in hand, with a checkpoint.
        """
        recipe, saved, began = self.recipe, time.monotonic(), time.monotonic() - self.seconds
        with ending() as came, tqdm(total=recipe.steps, initial=self.done, unit="step", dynamic_ncols=True,
                                    disable=not self.world.is_first) as bar:  # fmt: skip
            stop: float = 0
            while self.done < recipe.steps and not stop:
                self._validate()
                start = time.monotonic()
                values = self.step()
                self.seconds = time.monotonic() - began
                bar.update()
                bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)
                if self.log is not None:
                    every = self.done % recipe.log_every == 0 or self.done == recipe.steps
                    self.log.add(self.done, every, self.seconds, values | {
                        "step_seconds": time.monotonic() - start, "memory_gib": memory(self.device)})  # fmt: skip
                due = recipe.save_every and self.done % recipe.save_every == 0
                # Each process has a clock and signals of its own: what one of them wants, all do.
                wanted, stop = self.world.sum([time.monotonic() - saved > 60 * recipe.save_minutes, len(came)])
                due = due or wanted or stop
                if due or self.done == recipe.steps:
                    self.save()
                    saved = time.monotonic()
            if not stop:
                self._validate()
        if came and self.done < recipe.steps:
            if came[0] == signal.SIGINT:
                raise KeyboardInterrupt
            signal.raise_signal(came[0])

    @cached_property
    def prompts(self) -> list[str]:
        """Of samples: the recipe's, or the first two captions of the data."""
        captions: dict[str, None] = {}
        for step in range(0 if self.recipe.validation_prompts else 8):
            captions |= dict.fromkeys(self.data.load(self.data.batch(step, 1)).captions)
        captions.pop("", None)
        return list(self.recipe.validation_prompts) or list(captions)[:2] or [""]

    def _validate(self) -> None:
        every = self.recipe.validate_every
        if self.validation is not None and (self.done % (every or 1) == 0 or self.done == self.recipe.steps):
            self.validation.run()
        self.world.barrier("validation", WEEK)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """In the block, the network is as it will be used: the average of the weights, no dropout, no gradients."""
        self.unet.eval()
        try:
            with torch.no_grad(), self.averaged(), self.autocast(), self.used():
                yield
        finally:
            self.unet.train()

    def averaged(self) -> AbstractContextManager[None]:
        """In the block, the weights are their moving average, if the recipe has one."""
        return self.average.in_place() if self.average.decay else nullcontext()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Of MotionDirector's LoRAs, the temporal one alone makes samples: the motion without the look."""
        if self.recipe.train == "motiondirector":
            self.loras["spatial"].use(False)
        try:
            yield
        finally:
            if self.recipe.train == "motiondirector":
                self.loras["spatial"].use(True)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, beside the recipe and the data: names and tensors."""
        state = {f"trained/{name}": p.detach() for name, p in self.trained}
        state |= {f"average/{name}": x for (name, _), x in zip(self.trained, self.average.values, strict=False)}
        state |= {f"optimizer/{name}/{key}": torch.as_tensor(x) for name, p in self.trained
                  for key, x in self.optimizer.state.get(p, {}).items()}  # fmt: skip
        numbers = {"averaged": self.average.count, **{name: getattr(self, name) for name in NUMBERS}}
        return state | {f"number/{name}": torch.tensor(float(n), dtype=torch.float64) for name, n in numbers.items()}

    def save(self) -> None:
        """Write a checkpoint. Of several processes all must call it."""
        if is_sharded(self.unet):
            checkpoints.save(self.out, self.done, self.state(), self.recipe.keep, self.world)
        elif self.world.is_first:
            checkpoints.save(self.out, self.done, self.state(), self.recipe.keep)
        self.world.barrier("checkpoint")

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Take the values of a checkpoint. ValueError where it is that of another run."""
        parameters = dict(self.trained)

        def like(name: str) -> Tensor | None:
            return parameters.get(name.split("/")[1])

        state = checkpoints.read(path, self.world, like)
        try:
            for (name, p), average in zip_longest(self.trained, self.average.values):
                p.copy_(state[f"trained/{name}"])
                if average is not None:
                    average.copy_(state[f"average/{name}"])
            for name, x in state.items():
                kind, _, key = name.partition("/")
                if kind == "optimizer":
                    name, _, key = key.rpartition("/")
                    p = parameters[name]
                    is_count = not x.ndim and self.recipe.optimizer == "adamw8bit"
                    self.optimizer.state[p][key] = int(x) if is_count else x.to(p.device)
            for name in NUMBERS:
                setattr(self, name, type(getattr(self, name))(state[f"number/{name}"].item()))
            self.average.count = int(state["number/averaged"].item())
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is not a checkpoint of this run ({' '.join(str(error).split())})") from None
        if self.world.is_first:
            self.say(f"going on at step {self.done} from {path}")


def digest_of_some(network: nn.Module) -> str:
    """What tells a network from another at a glance: a hash of the first numbers of each of its tensors."""
    total = hashlib.sha256()
    for name, x in network.named_parameters():
        total.update(f"{name} {tuple(x.shape)} {x.detach().flatten()[:32].double().tolist()}".encode())
    return total.hexdigest()


def joined(pieces: list[Piece]) -> list[Piece]:
    """Pieces of one size as one."""
    if len({(p.latents.shape[1:], p.text.shape[1:]) for p in pieces}) > 1 or len(pieces) < 2:
        return pieces
    return [Piece(torch.cat([p.latents for p in pieces]), torch.cat([p.text for p in pieces]),
                  [s for p in pieces for s in p.sources], [n for p in pieces for n in p.numbers])]  # fmt: skip


def make_optimizer(groups: list[dict[str, Any]], recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101). Each group has its own `rate`, which steps multiply."""
    values = {"lr": recipe.rate, "betas": (0.9, recipe.beta2), "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise ValueError("optimizer 'adamw8bit' needs bitsandbytes: pip install 'minit2v[train-8bit]'") from None
        if device.type != "cuda":
            raise ValueError(f"optimizer 'adamw8bit' runs on CUDA, not on {device.type}")
        return AdamW8bit(groups, **values)
    return torch.optim.AdamW(groups, fused=True, **values)


def memory(device: torch.device) -> float:
    """The most memory that was taken so far, GiB: of the GPU, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@contextmanager
def ending() -> Iterator[list[int]]:
    """A list into which the first SIGTERM or Ctrl-C goes, for the run to end by itself; a second one ends it now."""
    came: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        came.append(number)
        for n, handler in before.items():
            signal.signal(n, handler)

    if threading.current_thread() is threading.main_thread():
        before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
        for n, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(n, note)
    try:
        yield came
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
