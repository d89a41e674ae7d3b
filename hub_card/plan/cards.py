"""GPUs by name: memory, and rates of reading and of matrix products."""

from dataclasses import dataclass

# Of a card's nominal memory: what the driver keeps, and a CUDA context with its modules.
_NOMINAL_SHARE, _CONTEXT_GIB = 0.985, 0.7
# Of a data sheet's rates, what is reached: the two cards that were measured read at 0.90 and 0.96 of theirs and
# multiply at 0.7 to 0.8.
_READ_SHARE, _MATMUL_SHARE = 0.9, 0.7


@dataclass(frozen=True)
class Card:
    """One GPU, or the processor with its memory.

    Args:
        name: for messages.
        gib: nominal memory.
        read_gb_s: gigabytes (10^9) a second that it reads.
        bf16_tflops: of large matrix products.
        measured: whether the rates were measured by us; else they are shares of the maker's.
    """

    name: str
    gib: float
    read_gb_s: float
    bf16_tflops: float
    measured: bool = False
    is_cpu: bool = False

    @property
    def usable(self) -> int:
        """Bytes for weights, cache and scratch."""
        kept = 2.0 if self.is_cpu else self.gib * (1 - _NOMINAL_SHARE) + _CONTEXT_GIB
        return max(int((self.gib - kept) * 2**30), 0)


def _by_maker(name: str, gib: float, read_gb_s: float, bf16_tflops: float) -> Card:
    return Card(name, gib, read_gb_s * _READ_SHARE, bf16_tflops * _MATMUL_SHARE)


# Rates of the makers' data sheets, but for the two that were measured (docs/benchmarks.md).
CARDS = {
    card.name: card
    for card in (
        _by_maker("RTX 3090", 24, 936, 71),
        _by_maker("RTX 4090", 24, 1008, 165),
        _by_maker("RTX 5090", 32, 1792, 210),
        _by_maker("L40S", 48, 864, 362),
        _by_maker("RTX A6000", 48, 768, 155),
        _by_maker("A100 80GB", 80, 2039, 312),
        Card("H100", 80, 3000, 700, measured=True),
        _by_maker("RTX PRO 6000", 96, 1792, 250),
        Card("H200", 141, 4600, 700, measured=True),
        _by_maker("B200", 180, 8000, 2250),
    )
}
# Two channels of DDR5-5600.
_DESKTOP_CPU = Card("CPU with two channels of DDR5", 64, 70, 1, is_cpu=True)


def find_card(name: str) -> Card:
    """The card whose name holds all words of `name`.

    Raises:
        ValueError: if there is none, or several; the message lists the names.
    """
    words = name.lower().split()
    found = [card for card in CARDS.values() if all(word in card.name.lower() for word in words)]
    if len(found) != 1:
        known = ", ".join(CARDS)
        raise ValueError(f"--gpu {name!r} fits {len(found)} of {known}; others need --gpu-memory and --read-rate")
    return found[0]


def card_of_size(gib: float, read_gb_s: float | None) -> Card:
    """A card of so much memory, at a rate that is given or that of the slowest known card of about that size."""
    nearest = min(CARDS.values(), key=lambda card: (abs(card.gib - gib), card.read_gb_s))
    rate = nearest.read_gb_s if read_gb_s is None else read_gb_s
    share = rate / nearest.read_gb_s
    like = f"read rate of an {nearest.name} assumed" if read_gb_s is None else "read rate as given"
    return Card(f"GPU of {gib:g} GiB ({like})", gib, rate, nearest.bf16_tflops * share)


def cpu_of_size(gib: float, read_gb_s: float | None) -> Card:
    """A processor with so much memory."""
    rate = read_gb_s or _DESKTOP_CPU.read_gb_s
    name = _DESKTOP_CPU.name if read_gb_s is None else "CPU (read rate as given)"
    return Card(name, gib, rate, _DESKTOP_CPU.bf16_tflops, is_cpu=True)


__all__ = ["CARDS", "Card", "card_of_size", "cpu_of_size", "find_card"]
