"""Which clips each step uses.

It is a function of the seed and the step alone. No random generator keeps a state, and nothing is counted up to a step.
So a run that is resumed, or shared by several processes, goes on with the same samples.
"""

import math
import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from .objective import drop_text
from .sources import Bucket, Clip, Source, chosen_frames


class Item(NamedTuple):
    """One row of a batch: the global number of the sample, and what is used of which clip."""

    number: int
    clip: int
    frames: tuple[int, ...]
    caption: str
    flip: bool


class Sampler:
    """Chooses the clips of each step.

    clips: all of them; an `Item` has their number in this list. sources: the sets that the clips come from.
    text_dropout: the share of samples that get the empty caption, 0 to 1.

    Buckets take turns in proportion to their samples. The sets in a bucket do so, too. The clips of a set come in a
    random order, and in another one after all of them were used. ValueError where only some sets have a weight.
    """

    def __init__(self, clips: Sequence[Clip], sources: Sequence[Source], seed: int, text_dropout: float = 0.0):
        self.clips, self.sources, self.seed, self.text_dropout = clips, sources, seed, text_dropout
        self.streams: dict[Bucket, dict[int, list[int]]] = {}  # bucket -> number of a set -> its clips
        for n, clip in enumerate(clips):
            self.streams.setdefault(clip.bucket, {}).setdefault(clip.source, []).append(n)
        self.shares = self._rows()
        self._orders: dict[tuple[Bucket, int], tuple[int, list[int]]] = {}

    def _rows(self) -> dict[Bucket, dict[int, Fraction]]:
        """How many samples of each bucket and set are used until each clip was used at least once."""
        count = [0] * len(self.sources)
        for clip in self.clips:
            count[clip.source] += self.sources[clip.source].repeats
        weights = [s.weight for s in self.sources]
        if any(w is not None for w in weights) and any(w is None for w in weights):
            raise ValueError("give a weight to every set, or to none")
        shares = {n: Fraction(c if (w := weights[n]) is None else w) for n, c in enumerate(count) if c}
        longest = max(count[n] / share for n, share in shares.items())
        return {bucket: {n: shares[n] * longest * len(clips) * self.sources[n].repeats / count[n]
                         for n, clips in sets.items()} for bucket, sets in self.streams.items()}  # fmt: skip

    def samples_of_a_round(self) -> Fraction:
        """How many samples are used until each clip was used at least once, on the average."""
        return sum((share for sets in self.shares.values() for share in sets.values()), Fraction(0))

    def batch(self, step: int, batch: int) -> list[Item]:
        """What step `step` (from 0) uses, in batches of `batch`. All rows are of one bucket."""
        if batch < 1 or step < 0:
            raise ValueError(f"batch is at least 1 and step at least 0, not {batch} and {step}")
        bucket, earlier = turn(in_whole_numbers({b: sum(sets.values()) for b, sets in self.shares.items()}), step)
        shares, items = in_whole_numbers(self.shares[bucket]), []
        for row in range(batch):
            n, used = turn(shares, earlier * batch + row)
            clips = self.streams[bucket][n]
            cycle, place = divmod(used, len(clips))
            items.append(self._item(step * batch + row, self._order(bucket, n, cycle)[place]))
        return items

    def _order(self, bucket: Bucket, n: int, cycle: int) -> list[int]:
        """The clips of a set in one bucket, shuffled for the `cycle`-th time."""
        known, order = self._orders.get((bucket, n), (-1, []))
        if known != cycle:
            order = list(self.streams[bucket][n])
            random.Random(f"{self.seed} order {tuple(bucket)} {n} {cycle}").shuffle(order)
            self._orders[bucket, n] = cycle, order
        return order

    def _item(self, number: int, n: int) -> Item:
        clip, rng = self.clips[n], random.Random(f"{self.seed} clip {number}")
        source = self.sources[clip.source]
        start = rng.randrange(clip.last + 1) if clip.start is None else clip.start
        caption = clip.captions[rng.randrange(len(clip.captions))]
        flip = rng.random() < 0.5 and source.flip
        if drop_text(self.seed, number, self.text_dropout):
            caption = ""
        return Item(number, n, chosen_frames(clip.facts, source, start), caption, flip)


def in_whole_numbers(shares: Mapping[Any, Fraction]) -> dict[Any, int]:
    """The same proportions."""
    unit = math.lcm(*(share.denominator for share in shares.values()))
    return {key: int(share * unit) for key, share in shares.items()}


def turn(shares: Mapping[Any, int], number: int) -> tuple[Any, int]:
    """Whose turn it is, and how many turns it had before. All take turns in proportion to `shares`.

    number: of the turn, from 0. The j-th turn of one with share p is due at (j + 1/2) / p. So at any time each one has
    had its share, to within a turn or two (Webster 1832, Sainte-Lague 1910: seats in a parliament).
    """
    if len(shares) == 1:
        return next(iter(shares)), number
    whole, n = sum(shares.values()), len(shares)
    # Each one had at least floor((number - n / 2) p - 1 / 2) turns. Only the last turns are gone through.
    had = {key: max(0, ((2 * number - n) * share - whole) // (2 * whole)) for key, share in shares.items()}
    for _ in range(number + 1 - sum(had.values())):
        now = min(shares, key=lambda key: Fraction(2 * had[key] + 1, shares[key]))
        had[now] += 1
    return now, had[now] - 1
