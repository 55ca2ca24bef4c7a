"""Fair times: contenders take turns, warm, and are compared round by round."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Row:
    """One comparison. ``ratio`` is ours over the peer's: below 1 is better."""

    suite: str
    case: str
    metric: str  # the unit
    ours: float  # a median, as is the peer's
    peer: float | None = None
    peer_name: str = ""
    ratio: float | None = None  # median of the paired ratios; None where only a value is reported
    spread: tuple[float, float] | None = None  # quartiles of the paired ratios
    target: float | None = None  # the ratio should be at most this; None where it is only reported
    within_spread: bool = False  # it is enough that the lower quartile is at most the target

    @property
    def met(self) -> bool | None:
        """Whether the target is."""
        if self.target is None:
            return None
        best = self.spread[0] if self.within_spread and self.spread else self.ratio
        return bool(best <= self.target)


@dataclass(frozen=True)
class Elsewhere:
    """A call that runs in another process, which takes the time itself and returns seconds."""

    call: Callable[[], float]


def interleaved(
    calls: Mapping[str, Callable[[], Any] | Elsewhere], rounds: int
) -> dict[str, np.ndarray]:
    """Seconds of each call in each round, after one round that is not counted.

    Every round has an order of its own (the same in every run): who always came after the one
    that moves most would always find the caches emptied, and pay for it. After a call elsewhere
    the last one made here is made again, untimed: the other process has emptied the caches, and
    whoever comes next shall find them as in every other turn.

    Args:
      calls: name -> what to time, until its result is there.
      rounds: of all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    here, cold, rng = None, False, np.random.default_rng(0)
    for _ in range(rounds + 1):
        for name in rng.permutation(list(calls)):
            call = calls[name]
            if isinstance(call, Elsewhere):
                seconds[name].append(call.call())
                cold = True
                continue
            if cold and here:
                jax.block_until_ready(here())
            here, cold = call, False
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def median_ratio(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Median and quartiles of the paired ratios of values of the same rounds."""
    low, median, high = np.quantile(ours / theirs, (0.25, 0.5, 0.75))
    return float(median), (float(low), float(high))


def compare(
    suite: str,
    case: str,
    seconds: Mapping[str, np.ndarray],
    *,
    ours: str = "sn_jax",
    targets: Mapping[str, float] | None = None,
    within_spread: Collection[str] = (),
) -> list[Row]:
    """One row for each peer from what ``interleaved`` measured, in milliseconds.

    Args:
      suite, case: for the rows.
      seconds: name -> times of the rounds.
      ours: the name that the others are compared with.
      targets: peer -> largest ratio that is good enough.
      within_spread: peers whose target may lie within the spread.
    """
    rows = []
    for peer, times in seconds.items():
        if peer == ours:
            continue
        our, their = (1e3 * float(np.median(x)) for x in (seconds[ours], times))
        ratio, spread = median_ratio(seconds[ours], times)
        target = (targets or {}).get(peer)
        rows.append(Row(suite, case, "ms", our, their, peer, ratio, spread, target,
                        peer in within_spread))  # fmt: skip
    return rows
