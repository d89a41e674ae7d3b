"""Whether a model is still as it was when it was last looked at: a cheap comparison, and a whole one."""

import itertools
import weakref
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .plain_adapters import AdapterSwitches
from .plain_modules import Noticing, classes_are_as_listed, count_registrations, events

_dtype_of = attrgetter("dtype")
# No step depends on them, and RL loops change them around every rollout.
_UNREAD = frozenset({"training", "gradient_checkpointing", "_recomputes"})
_SCALARS = (bool, int, float, str, type(None), torch.device, torch.dtype)


class ModuleWatch:
    """Flat lists of what a model was made of at the last `keep`. `plain_modules` says what each look notices.

    The lists hold the insides of the model, so the watch must belong to it. They don't hold the model itself (a cycle
    would keep its memory), so what hangs on the outermost module is for others to ask.
    """

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None

    def keep(self, model: nn.Module) -> tuple[Any, ...]:
        """Remember `model` as it is.

        Returns:
            All that a captured step was made from, but for `switches`, to compare with what an earlier call returned:
            classes, scalars on the modules, and where each tensor is, its dtype, shape and strides.
        """
        count_registrations()
        self._events = events()  # first: what changes from here on is seen by the next look
        self._model = weakref.ref(model)
        modules = list(model.modules())
        self._dicts = [module.__dict__ for module in modules[1:]]
        self._lengths = list(map(len, self._dicts))
        self._leaves = [module.__dict__ for module in modules[1:] if not isinstance(module, Noticing)]
        self._leaf_lengths = list(map(len, self._leaves))
        self._own = [module.__dict__ for module in modules[1:] if isinstance(module, Noticing)]
        self._own_copies = [dict(held) for held in self._own]
        members = [(module._parameters, module._buffers, module._modules) for module in modules]
        hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in modules[1:]]
        self._tables = [table for tables in members for table in tables if table] + list(itertools.chain(*hooks))
        self._tables += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self._table_copies = [dict(table) for table in self._tables]
        self._adapters = AdapterSwitches(modules)
        self._config = model.config.__dict__
        self._config_copy = dict(self._config)
        tensors = [*model.parameters(), *model.buffers()]
        self._tensors = [x for x in tensors if type(x) in (nn.Parameter, torch.Tensor)]  # the others are never plain
        self._addresses, self._dtypes = self._where(self._tensors)
        scalars = [
            {name: value for name, value in module.__dict__.items() if type(value) in _SCALARS and name not in _UNREAD}
            for module in modules
            if isinstance(module, Noticing)
        ]
        layouts = [(x.shape, x.stride()) for x in self._tensors]
        return list(map(type, modules)), scalars, self._addresses, self._dtypes, layouts

    @property
    def switches(self) -> tuple[Any, ...]:
        """What adapters were switched to at the last `keep`; hashable."""
        return self._adapters.key()

    @staticmethod
    def _where(tensors: list[torch.Tensor]) -> tuple[list[int], list[torch.dtype]]:
        return list(map(torch.Tensor.data_ptr, tensors)), list(map(_dtype_of, tensors))

    def seems_same(self, model: nn.Module) -> bool:
        """The cheap look: whether nothing that is counted has happened since the last look (some microseconds)."""
        return (
            self._model is not None
            and self._model() is model
            and events() == self._events
            and list(map(len, self._leaves)) == self._leaf_lengths
            and _equal(self._config, self._config_copy)
            and self._adapters.are_same()
            and classes_are_as_listed()
        )

    def is_same(self, model: nn.Module) -> bool:
        """The whole look: every module, attribute, hook, parameter and buffer is the same object in its place.

        What was counted may have been about another model: where nothing here is changed, it is forgotten.
        """
        if self._model is None or self._model() is not model:
            return False
        now = events()
        is_same = (
            (now == self._events or _equal(self._own, self._own_copies))
            and list(map(len, self._dicts)) == self._lengths
            and _equal(self._tables, self._table_copies)
            and _equal(self._config, self._config_copy)
            and self._adapters.are_same()
            and classes_are_as_listed()
            and self._where(self._tensors) == (self._addresses, self._dtypes)
            and all(map(torch.Tensor.is_contiguous, self._tensors))
        )
        if is_same:
            self._events = now
        return is_same


def _equal(now: Any, kept: Any) -> bool:
    """`now == kept`, for containers of tensors and modules: identical members are equal, others need not compare."""
    try:
        return bool(now == kept)
    except (RuntimeError, TypeError, ValueError):
        return False


__all__ = ["ModuleWatch"]
