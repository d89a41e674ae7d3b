"""
Stand-ins for `triton` and `triton.language` on machines without Triton.

The kernel modules must import everywhere (transformers' loader imports every file of a Hub folder), so they take
`triton` and `tl` from here when the package is missing. Nothing here computes: `is_available()` of
`gpu/availability.py` is False and the public ops raise.
"""

from typing import Any


class _Absent:
    """Answers every attribute with itself; as a decorator it returns the function it was given."""

    def __getattr__(self, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self


triton = _Absent()
tl = _Absent()
