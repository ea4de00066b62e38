"""One trainer for `UNet3DConditionModel` and `UNetMotionModel`: whole networks, parts of them, and LoRAs.

    trainer = Trainer(pipe, data, Recipe(data=("clips",), out="runs/mine"))
    trainer.run()                                   # goes on from a checkpoint; `trainer.step()` is one step

The batch of a step and everything random in it are functions of the seed and the step. So a checkpoint needs no random
state, and a killed run goes on with exactly the same steps.
"""

import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.unet_motion import UNetMotionModel
from ..parallel import WEEK, World, is_sharded, local
from . import checkpoints
from .export import check_format
from .logs import Log, memory
from .objective import Objective, choose_frames, generators, happens
from .optimizer import Average, make_optimizer
from .recipe import Recipe
from .signals import ending
from .trainable import prepare, without_time
from .validation import Validation

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PATIENCE = 5  # the run stops after so many steps in a row whose loss or gradient is not finite
GROWTH = 1000  # good steps after which fp16's loss scale doubles
NUMBERS = ("done", "seconds", "bad", "skipped", "scale", "good")  # what a checkpoint has beside tensors


class Piece(NamedTuple):
    """Rows that go through the network together. latents (b c f h w), text (b l d) of the text encoder as it was.

    numbers: the global numbers of the samples.
    """

    latents: Tensor
    text: Tensor
    sources: Sequence[str]
    numbers: Sequence[int]
    captions: Sequence[str] = ()


class Trainer:
    """Trains the UNet of a pipeline as a recipe says. It begins with the newest checkpoint in `recipe.out`.

    pipe: its own networks are trained, and frozen weights are cast to the precision.
    data: a `Data`, or another object with `batch(step, count)`, `load(items)`, `fingerprint` and a length. Where it
        has `prefetch(items)`, that is called one step ahead.
    world: the processes, from `minit2v.parallel.world()`.
    prior: data of what the model should not forget.
    say: takes lines for people.
    resume_anyway: go on although the recipe has changed.

    Raises ValueError where the recipe does not fit the model, or the folder belongs to another run.
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
        pipe.restore()  # the plain networks: the fast path has copies of the weights
        motion = family == "UNetMotionModel" and recipe.train != "image"
        self.objective = Objective(
            pipe.scheduler, objective=recipe.objective, betas=recipe.betas, motion=motion, zero_snr=recipe.zero_snr,
            noise_offset=recipe.noise_offset, offset_per=recipe.offset_per, min_snr=recipe.min_snr,
            timesteps=recipe.timesteps, high_share=recipe.high_share, high_from=recipe.high_from,
        )  # fmt: skip
        pipe.scheduler = self.objective.scheduler_for(pipe.scheduler)
        about = {"model": checkpoints.digest_of_some(self.unet), "data": getattr(data, "fingerprint", None),
                 "prior": getattr(prior, "fingerprint", None)}  # fmt: skip
        self._prepare()
        self._spread()
        self.optimizer = make_optimizer(self.groups, recipe, self.device)
        self.average = Average(self.parameters, recipe.ema or 0.0)
        # The weights of step 0, also in a resumed run: they make the targets of prior rows.
        self.first = Average(self.parameters, 1.0) if recipe.prior_rows and recipe.prior_target == "model" else None
        self.done, self.seconds, self.bad, self.skipped = 0, 0.0, 0, 0
        self.scale, self.good = (2.0**16 if recipe.precision == "fp16" else 1.0), 0
        self.world.from_first(lambda: checkpoints.claim(self.out, recipe, about, resume_anyway))
        if (path := self.world.from_first(lambda: checkpoints.newest(self.out))) is not None:
            self.load(path)
        self.log = Log(self.out, self.done) if self.world.is_first else None
        alone = self.world.is_first or is_sharded(self.unet)  # no process has all of sharded weights
        self.validation = Validation(self) if recipe.validate_every and alone else None

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        with tqdm.external_write_mode():
            self._say(text)

    # What is trained -------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Choose what is trained: `trained` (names and parameters) and `loras`.

        Trained weights are float32 or wider, because 16 bits would lose small steps. Frozen weights get the precision
        of the recipe, unless the result contains them: it should not have rounded weights.
        """
        recipe, unet = self.recipe, self.unet
        _, generator = generators(recipe.seed, "lora", 0)
        self.loras, self.trained = prepare(unet, recipe, generator, getattr(self.pipe, "text_encoder", None))
        if recipe.kohya:
            check_format([*self.loras.values()], "kohya")
        for name, p in self.trained:
            if torch.finfo(p.dtype).bits < 32:
                raise ValueError(f"{name} is {p.dtype}: load the model in float32; precision says what it computes in")
        if recipe.precision != "float32" and (self.loras or recipe.train == "motion"):
            for p in unet.parameters():
                if not p.requires_grad and p.ndim > 1:  # norms and biases are small: they stay exact
                    p.data = p.data.to(DTYPES[recipe.precision or "float32"])
        if recipe.checkpointing:
            unet.enable_gradient_checkpointing()
        self._learn(True)

    def _learn(self, on: bool) -> None:
        """Training mode, or evaluation mode without dropout."""
        self.unet.train(on)
        if "text" in self.loras:
            self.pipe.text_encoder.train(on)

    def _spread(self) -> None:
        """Share the network among the processes, and set `parameters` and `groups`, which the optimizer gets.

        Each process has all of a LoRA, and its gradients are summed in one message. A network that is trained itself is
        wrapped by DDP, or sharded.
        """
        recipe, unet = self.recipe, self.unet
        self.network: nn.Module = unet
        if recipe.parallel == "fsdp":
            if recipe.optimizer == "adamw8bit":
                raise ValueError("optimizer 'adamw8bit' does not go with parallel 'fsdp'")
            if "text" in self.loras:
                raise ValueError("train_text does not go with parallel 'fsdp': use 'ddp'")
            places = {id(p): name for name, p in unet.named_parameters()}
            self.network = self.world.shard(unet, recipe.precision or "float32")
            found = dict(unet.named_parameters())
            self.trained = [(name, found[places[id(p)]]) for name, p in self.trained]
        elif not self.loras and not self.has_stills:
            self.network = self.world.replicate(unet)
        self.parameters = [p for _, p in self.trained]
        rates = {"spatial": recipe.spatial_learning_rate}
        usual = recipe.learning_rate
        self.groups = [{"params": lora.parameters(), "rate": rates.get(kind, usual)}
                       for kind, lora in self.loras.items()] or [{"params": self.parameters, "rate": usual}]

    @property
    def has_stills(self) -> bool:
        """Whether some steps use only the spatial layers. Then DDP would wait for gradients that never come."""
        return self.recipe.stills == "spatial" and any(
            clip.bucket.frames == 1 for data in (self.data, self.prior) for clip in getattr(data, "clips", ()))

    # One step --------------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """One step of the optimizer on the batch of this step. Returns its loss, gradient norm and learning rate."""
        rng, _ = generators(self.recipe.seed, f"dropout {self.world.rank}", self.done)
        torch.manual_seed(rng.getrandbits(60))  # of dropout
        self.optimizer.zero_grad(set_to_none=True)
        self.pieces = self.batch(self.done)
        self.prefetch(self.done + 1)
        losses = []
        for n, piece in enumerate(self.pieces):
            with self.world.accumulating(self.network, last=n == len(self.pieces) - 1):
                losses.append(self.backward(piece))
        if self.network is self.unet and not is_sharded(self.unet):
            self.world.sum_gradients(self.parameters)
        for p in self.parameters:
            if p.grad is not None and self.scale != 1:
                p.grad /= self.scale
        norm = self.world.clip(self.parameters, self.recipe.max_grad_norm)
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
        """This process's rows of a step, in as many pieces as the recipe accumulates.

        Rows of the data and of the prior set go through the network together where they have one size.
        """
        recipe, rows = self.recipe, self.rows(step)
        pieces: list[Piece] = []
        for k in range(recipe.accumulate):
            found: list[Piece] = []
            for data, mine in rows:
                if part := mine[k :: recipe.accumulate]:
                    batch = data.load([item for item, _ in part])
                    numbers = [step * recipe.batch + row for _, row in part]
                    found.append(Piece(batch.latents, batch.text, batch.sources, numbers, batch.captions))
            pieces += joined(found)
        return pieces

    def rows(self, step: int) -> list[tuple[Any, list[tuple[Any, int]]]]:
        """What this process computes of a step: each data set, its items, and their rows in the global batch.

        The rows of the prior set are the last ones.
        """
        recipe, found, first = self.recipe, [], 0
        for data, count in ((self.data, recipe.batch - recipe.prior_rows), (self.prior, recipe.prior_rows)):
            if count:
                items = zip(data.batch(step, count), range(first, first + count), strict=True)
                found.append((data, self.world.share(list(items))))
            first += count
        return found

    def prefetch(self, step: int) -> None:
        """Have the clips of a later step decoded while this one is computed."""
        for data, mine in self.rows(step) if step < self.recipe.steps else ():
            if hasattr(data, "prefetch"):
                data.prefetch([item for item, _ in mine])

    def backward(self, piece: Piece) -> Tensor:
        """Add the gradients of a piece, and return its losses (b,).

        The loss is the sum over the rows divided by the whole batch. So the pieces do not change the step.
        """
        if self.recipe.train == "motiondirector":
            return self.backward_director(piece)
        latents, text = self.placed(piece)
        with self.layers_for(latents):
            noisy, t, target, _ = self.objective.noised(latents, self.recipe.seed, piece.numbers)
            if self.first is not None:
                target = self.kept(noisy, t, text, target, piece.numbers)
            with self.autocast():
                prediction = self.network(noisy, t, self.encoded(piece.captions, text))
            losses = self.objective.loss(prediction, target, t)
            self.world.backward(losses.sum() * (self.scale / self.recipe.batch), self.network)
        return losses.detach()

    @torch.no_grad()
    def kept(self, noisy: Tensor, t: Tensor, text: Tensor, target: Tensor, numbers: Sequence[int]) -> Tensor:
        """The target (b c f h w). In rows of the prior set it is what the model said before training.

        Learning without forgetting (Li and Hoiem 2016, arXiv:1606.09282). An unchanged model has no loss in these rows,
        unlike with the noise of a clip as the target. text: of the text encoder before training.
        """
        rows = [r for r, n in enumerate(numbers) if n % self.recipe.batch >= self.recipe.batch - self.recipe.prior_rows]
        if not rows or self.first is None:
            return target
        self._learn(False)
        with self.first.in_place(), self.autocast():
            said = self.unet(noisy[rows], t[rows], text[rows])
            if is_sharded(self.unet):
                self.unet.reshard()  # after a forward the root keeps whole weights: here those of step 0
        self._learn(True)
        target = target.clone()
        target[rows] = said.to(target)
        return target

    def backward_director(self, piece: Piece) -> Tensor:
        """MotionDirector's two paths (Zhao et al. 2023, arXiv:2310.08465), row by row.

        The spatial path runs in four of five rows: one frame teaches the spatial LoRA what the clip looks like. The
        temporal path runs in every row: the whole clip teaches the temporal LoRA. In rows with a spatial path the
        spatial LoRA is on there, too. One path ends with its backward before the other begins, to save memory.
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

    def encoded(self, captions: Sequence[str], text: Tensor) -> Tensor:
        """Text states (b l d) by the text encoder that is trained; `text` where it is not trained."""
        if "text" not in self.loras:
            return text
        with warnings.catch_warnings():  # --check counts captions that are cut
            warnings.simplefilter("ignore")
            ids = self.pipe.tokenizer(list(captions))
        return self.pipe.text_encoder(ids.to(self.device)).to(text)

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in the precision of the recipe."""
        if self.recipe.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.recipe.precision or "float32"])

    def layers_for(self, latents: Tensor) -> AbstractContextManager[None]:
        """A still goes through the spatial layers only, if the recipe does not say otherwise."""
        return without_time(self.unet) if latents.shape[2] == 1 and self.recipe.stills == "spatial" else nullcontext()

    def skip(self, loss: float, losses: Sequence[Tensor]) -> None:
        """Say what is not finite, and leave the weights as they are. RuntimeError at the fifth time in a row.

        In fp16 a scaled gradient can be too large. That is not a fault: the scale of the loss is halved.
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

        SIGTERM and Ctrl-C end it after the step that runs, with a checkpoint.
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
                # Each process has its own clock and signals. What one of them wants, all do.
                wanted, stop = self.world.sum([time.monotonic() - saved > 60 * recipe.save_minutes, len(came)])
                due = due or wanted or stop
                if due or self.done == recipe.steps:
                    self.save()
                    saved = time.monotonic()
            if not stop:
                self._validate()
        if came and self.done < recipe.steps:
            if self.world.is_first:
                self.say(f"step {self.done} is saved in {self.out}; the same command goes on from it")
            if came[0] == signal.SIGINT:
                raise KeyboardInterrupt
            signal.raise_signal(came[0])

    @cached_property
    def prompts(self) -> list[str]:
        """The prompts of samples: those of the recipe, or the first two captions of the data."""
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
        """In the block, the network is as it will be used: averaged weights, no dropout, no gradients."""
        self._learn(False)
        try:
            with torch.no_grad(), self.averaged(), self.autocast(), self.used():
                yield
        finally:
            self._learn(True)

    def averaged(self) -> AbstractContextManager[None]:
        """In the block, the weights are their moving average, if the recipe has one."""
        return self.average.in_place() if self.average.decay else nullcontext()

    @contextmanager
    def used(self) -> Iterator[None]:
        """In the block, only MotionDirector's temporal LoRA is on: samples show the motion without the look."""
        if self.recipe.train == "motiondirector":
            self.loras["spatial"].use(False)
        try:
            yield
        finally:
            if self.recipe.train == "motiondirector":
                self.loras["spatial"].use(True)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Names and tensors: everything that the next step needs beside the recipe and the data."""
        state = {f"trained/{name}": p.detach() for name, p in self.trained}
        state |= {f"average/{name}": x for (name, _), x in zip(self.trained, self.average.values, strict=False)}
        state |= {f"optimizer/{name}/{key}": torch.as_tensor(x) for name, p in self.trained
                  for key, x in self.optimizer.state.get(p, {}).items()}  # fmt: skip
        numbers = {"format": checkpoints.FORMAT, "averaged": self.average.count}
        numbers |= {name: getattr(self, name) for name in NUMBERS}
        return state | {f"number/{name}": torch.tensor(float(n), dtype=torch.float64) for name, n in numbers.items()}

    def save(self) -> None:
        """Write a checkpoint. All processes must call it."""
        if is_sharded(self.unet):
            checkpoints.save(self.out, self.done, self.state(), self.recipe.keep, self.world)
        elif self.world.is_first:
            checkpoints.save(self.out, self.done, self.state(), self.recipe.keep)
        self.world.barrier("checkpoint")

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Take the values of a checkpoint. ValueError where it belongs to another run or has another format."""
        parameters = dict(self.trained)
        state = checkpoints.read(path, self.world, lambda name: parameters.get(name.partition("/")[2].split("/")[0]))
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


def joined(pieces: list[Piece]) -> list[Piece]:
    """One piece instead of several, if they have one size."""
    if len({(p.latents.shape[1:], p.text.shape[1:]) for p in pieces}) > 1 or len(pieces) < 2:
        return pieces
    return [Piece(torch.cat([p.latents for p in pieces]), torch.cat([p.text for p in pieces]),
                  [s for p in pieces for s in p.sources], [n for p in pieces for n in p.numbers],
                  [c for p in pieces for c in p.captions])]  # fmt: skip
