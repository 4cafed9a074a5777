"""Where a run's time went: sums that add up across bundles and workers, and what they advise.

A thread that carries images through the steps reads, waits for decoded pictures, hands them to the
model, and does the rest (writing above all); decoding and the model go on beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_STEPS = 4  # buckets from one power of two to the next: a quantile is at most 19 % off
_SMALLEST, _LARGEST = -3 * _STEPS, 20 * _STEPS  # an eighth of a millisecond, 17 minutes
_TOO_SHORT = 10.0  # seconds: start-up and first calls are most of a shorter run


@dataclass(frozen=True, slots=True)
class Timing:
    """What some images took.

    `images` were decoded or refused, of `bytes` encoded; `decoded` counts them by `bucket`.
    `batches` held `filled` images in `slots` places; `reused` images had the bytes of another one,
    whose vectors were taken; `retries` are reads of input that were tried again. All else is in
    seconds: `decode` of the threads or processes that decode, the others of the threads that carry
    images. `carry` is all of their time, `inference` that in which the model ran on pictures of
    theirs; they `read` and `wait` where it did not.
    """

    images: int = 0
    bytes: int = 0
    decoded: Mapping[int, int] = field(default_factory=dict)
    decode: float = 0.0
    read: float = 0.0
    wait: float = 0.0
    carry: float = 0.0
    batches: int = 0
    filled: int = 0
    slots: int = 0
    inference: float = 0.0
    reused: int = 0
    retries: int = 0

    @classmethod
    def of_decoding(
        cls, seconds: Sequence[float], size: int, read: float, wait: float, carry: float
    ) -> Timing:
        """That of images that took `seconds` each to decode, `size` bytes in all."""
        decoded = Counter(map(bucket, seconds))
        return cls(len(seconds), size, decoded, sum(seconds), read, wait, carry)

    @classmethod
    def total(cls, timings: Iterable[Timing]) -> Timing:
        """The sum of `timings`, in whatever order and grouping."""
        decoded: Counter[int] = Counter()
        sums: Counter[str] = Counter()
        for timing in timings:
            decoded.update(timing.decoded)
            for name in cls.__slots__:  # type: ignore[attr-defined]
                if name != "decoded":
                    sums[name] += getattr(timing, name)
        return cls(decoded=decoded, **sums)

    def up_to(self) -> dict[str, int]:
        """Images by the least power of two, in milliseconds, in which they were decoded."""
        powers: Counter[int] = Counter()
        for index, count in self.decoded.items():
            powers[math.ceil(index / _STEPS)] += count
        return {f"{2.0**power:g}": powers[power] for power in sorted(powers)}

    def decode_quantile(self, share: float) -> float:
        """Milliseconds in which `share` of the images were decoded, within a bucket; 0 of none."""
        left = share * self.images
        for index in sorted(self.decoded):
            if left <= self.decoded[index]:
                return float(2 ** ((index - 1 + left / self.decoded[index]) / _STEPS))
            left -= self.decoded[index]
        return 0.0

    def described(self) -> dict[str, Any]:
        """As a manifest holds it; see README.md."""
        return {
            "images": self.images,
            "bytes": self.bytes,
            "decode_ms": {
                "sum": _ms(self.decode),
                "p50": round(self.decode_quantile(0.5), 2),
                "p95": round(self.decode_quantile(0.95), 2),
                "up_to": self.up_to(),
            },
            "read_ms": _ms(self.read),
            "retries": self.retries,
            "wait_ms": _ms(self.wait),
            "inference_ms": _ms(self.inference),
            "carry_ms": _ms(self.carry),
            "batches": self.batches,
            "reused": self.reused,
            "batch_fill": round(self.filled / self.slots, 4) if self.slots else None,
        }


def bucket(seconds: float) -> int:
    """The bucket of a duration; bucket n ends at 2 ** (n / 4) milliseconds."""
    if seconds <= 0:
        return _SMALLEST
    return max(_SMALLEST, min(_LARGEST, math.ceil(_STEPS * math.log2(1000 * seconds))))


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def advice(timing: Mapping[str, Any], options: Mapping[str, Any], vectors: int) -> str | None:
    """One line: where the time went and what would mend it; None where nothing was decoded.

    `timing` is as `described`; `options` are the run's, of which no flag is advised that it had;
    `vectors` is how many of them a row has.
    """
    if not timing.get("images"):
        return None
    read, wait, model = (timing[name] for name in ("read_ms", "wait_ms", "inference_ms"))
    whole = max(timing["carry_ms"], read + wait + model, 1)
    rest = whole - read - wait - model
    fill = timing["batch_fill"]
    shares = {name: ms / whole for name, ms in (("read", read), ("wait", wait), ("rest", rest))}
    told = (
        f"the model ran {model / whole:.0%} of the time, waited {shares['wait']:.0%} for pictures "
        f"to be decoded and {shares['read']:.0%} for input; {shares['rest']:.0%} went to writing "
        f"and the rest; a picture took {timing['decode_ms']['p50']:g} ms to decode"
    )
    if whole < 1000 * _TOO_SHORT:
        return f"{told}; too short a run for advice"
    if fill is not None and fill < 0.75:
        return f"{told}; batches were {fill:.0%} full: a smaller --batch_size would waste less"
    worst = max(shares, key=lambda name: shares[name])
    if shares[worst] < 0.1:
        worst = "model"
    had = {
        "rest": vectors == 1,
        "model": options.get("precision") == "bfloat16",
    }
    return f"{told}; {_ADVICE[worst]}{'' if had.get(worst) else _FLAGS.get(worst, '')}"


_ADVICE = {
    "read": "input is the limit: more workers, larger files or a nearer store would feed the model",
    "wait": "decoding is the limit: more vCPU to each model would decode further ahead of it",
    "rest": "writing is the limit: a nearer store would take less",
    "model": "the model is the limit: decoding keeps up, so a faster device or more of them would "
    "help",
}
_FLAGS = {
    "rest": ", and fewer --outputs",
    "model": ", and --precision bfloat16 for a large network or on CPUs that have it",
}
