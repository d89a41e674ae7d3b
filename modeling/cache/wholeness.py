"""Whether a cache holds exactly the tokens that it counts, all layers the same ones.

A forward changes the layers of a cache one after the other, so a failure in between leaves them with different tokens.
Whatever changes more than one layer therefore does so inside `Wholeness.change`: it sets a mark before the first
change and clears it after the last. A failure takes the change back where that is cheap. Where it isn't, the mark
stays, and every further use of the cache is refused, until `restore` or `reset` has made it whole again. The same mark
refuses a second thread that would change the cache at the same time.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Wholeness:
    """The mark of one cache (module docstring). Copies of a cache get a copy of it."""

    def __init__(self) -> None:
        self._change: str | None = None
        self._thread = 0

    @property
    def is_whole(self) -> bool:
        """Whether no change is under way or has failed."""
        return self._change is None

    def check(self) -> None:
        """Raise ValueError if the cache is not whole, or if another thread is changing it."""
        change, thread = self._change, self._thread
        if change is None or thread == threading.get_ident():
            return
        if thread:
            raise ValueError(
                f"past_key_values is being changed by another thread ({change}); give every thread a cache of its "
                "own, such as cache.fork(1)[0]"
            )
        raise ValueError(
            f"past_key_values is not whole: {change} failed or was interrupted half way, and its layers hold different "
            "tokens now. Go back with cache.restore(snapshot) to a snapshot() taken earlier, or call cache.reset() and "
            "run the whole prompt again"
        )

    def clear(self) -> None:
        """The change has ended well, or was taken back whole."""
        self._change, self._thread = None, 0

    def abandon(self, change: str | None = None) -> None:
        """The change has failed and can't be taken back: from now on `check` refuses.

        Args:
            change: names it, where no change is under way.
        """
        self._change, self._thread = change or self._change, 0

    @contextmanager
    def change(self, what: str, undo: Callable[[], bool] | None = None, mends: bool = False) -> Iterator[None]:
        """The context in which a cache is changed.

        Args:
            what: the change, for the error of `check`.
            undo: called after a failure; takes the change back and returns True, or returns False. None if it can't be.
            mends: whether the change replaces all that the cache holds, so that it need not be whole before.

        Raises:
            ValueError: if the cache is not whole, or in use by another thread.
        """
        if not mends and self._change is not None and self._thread == threading.get_ident():
            yield  # part of a larger change, which answers for it
            return
        if not mends or self._thread:
            self.check()
        is_whole = False
        try:
            self._change, self._thread = what, threading.get_ident()
            yield
            is_whole = True
        except BaseException:
            is_whole = undo is not None and undo()
            raise
        finally:
            if is_whole:
                self.clear()
            else:
                self.abandon()


__all__ = ["Wholeness"]
