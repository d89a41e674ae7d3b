"""Sequences of the synthetic tasks of arXiv 2510.26692, section 5.1 and Fig. 4: palindrome, recall, stack.

Each function makes (ids [P, length], targets [P, length]), both int64 on the generator's device. A target is the token
that follows, where a model can know it, and IGNORED elsewhere.
"""

from collections.abc import Callable

import torch

IGNORED = -100

PALINDROME_SYMBOLS = 64
RECALL_KEYS, RECALL_VALUES = 1024, 1024
STACKS, STACK_ELEMENTS = 64, 64


def palindrome(sequences: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random symbols, a separator, then the same symbols backwards, which are the targets.

    Tokens: 0 is the separator, symbols follow.
    """
    half = length // 2
    symbols = 1 + torch.randint(PALINDROME_SYMBOLS, (sequences, half), generator=generator, device=generator.device)
    separator = symbols.new_zeros(sequences, 1)
    whole = torch.cat([symbols, separator, symbols.flip(1)], dim=1)
    return _pairs(whole, length, first=half)


def recall(sequences: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-query associative recall: keys with values in the first half, then the keys in another order, each asked.

    A quarter of the positions hold keys, none twice; after a key of the second half its value is the target. Tokens:
    keys first, values after them.
    """
    pairs, device = length // 4, generator.device
    keys = torch.rand(sequences, RECALL_KEYS, generator=generator, device=device).argsort(dim=1)[:, :pairs]
    values = RECALL_KEYS + torch.randint(RECALL_VALUES, (sequences, pairs), generator=generator, device=device)
    order = torch.rand(sequences, pairs, generator=generator, device=device).argsort(dim=1)
    given = torch.stack([keys, values], dim=2).flatten(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], dim=2).flatten(1)
    ids = torch.cat([given, asked], dim=1)
    targets = torch.full_like(ids, IGNORED)
    targets[:, 2 * pairs :: 2] = values.gather(1, order)
    return _filled(ids, length, 0), _filled(targets, length, IGNORED)


def stack(sequences: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Operations on 64 stacks: "push s e" puts an element on stack s, "pop s" is followed by the topmost one.

    An operation is three tokens (operation, stack, element); the element of a pop is the target at its stack. Half of
    the operations are pops where a stack that has elements was drawn. Tokens: push, pop, stacks, elements.
    """
    device, operations = generator.device, length // 3

    def draw(most: int) -> torch.Tensor:
        return torch.randint(most, (sequences, operations), generator=generator, device=device)

    pops, stacks, elements = draw(2).bool(), draw(STACKS), draw(STACK_ELEMENTS)
    # A stack is a list of operations linked from its top downwards; operation 0 stands for its bottom.
    top = torch.zeros(sequences, STACKS, dtype=torch.int64, device=device)
    below = torch.zeros(sequences, operations + 1, dtype=torch.int64, device=device)
    held = torch.zeros(sequences, operations + 1, dtype=torch.int64, device=device)
    held[:, 1:] = elements
    popped = torch.zeros_like(pops)
    for i in range(operations):
        which = stacks[:, i : i + 1]
        upper = top.gather(1, which)
        popping = pops[:, i : i + 1] & (upper > 0)
        popped[:, i : i + 1] = popping
        elements[:, i : i + 1] = torch.where(popping, held.gather(1, upper), elements[:, i : i + 1])
        below[:, i + 1 : i + 2] = upper
        top.scatter_(1, which, torch.where(popping, below.gather(1, upper), i + 1))
    ids = torch.stack([popped.long(), 2 + stacks, 2 + STACKS + elements], dim=2).flatten(1)
    targets = torch.full_like(ids, IGNORED)
    targets[:, 1::3] = torch.where(popped, 2 + STACKS + elements, IGNORED)
    return _filled(ids, length, 0), _filled(targets, length, IGNORED)


def _pairs(whole: torch.Tensor, length: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `length` tokens and what follows each, from position `first` on."""
    ids, targets = whole[:, :length], whole[:, 1 : length + 1].clone()
    targets[:, :first] = IGNORED
    return _filled(ids, length, 0), _filled(targets, length, IGNORED)


def _filled(x: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, length - x.shape[1]), value=value)


TASKS: dict[str, tuple[Callable[[int, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]], int]] = {
    "palindrome": (palindrome, 1 + PALINDROME_SYMBOLS),
    "recall": (recall, RECALL_KEYS + RECALL_VALUES),
    "stack": (stack, 2 + STACKS + STACK_ELEMENTS),
}
"""Name -> (generator, tokens of its vocabulary)."""

__all__ = ["IGNORED", "TASKS", "palindrome", "recall", "stack"]
