"""A training step of a small model as one CUDA graph: launches of two layers would otherwise wait for the host."""

from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3


class CapturedTraining:
    """Steps of AdamW on batches of one shape.

    Args:
        model: in fp32 on one device; products run in bf16 by autocast.
        loss_of: logits fp32 [N, vocabulary], targets [N] -> loss.
        learning_rate: of the first step; `set_learning_rate` changes it.
        weight_decay: of matrices.
    """

    def __init__(
        self,
        model: Any,
        loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        learning_rate: float,
        weight_decay: float = 0.1,
        clip_norm: float = 1.0,
    ) -> None:
        self.model, self.loss_of, self.clip_norm = model, loss_of, clip_norm
        self.device = next(model.parameters()).device
        on_gpu = self.device.type == "cuda"
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        rate = torch.tensor(learning_rate, device=self.device) if on_gpu else learning_rate
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), capturable=on_gpu)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[torch.Tensor, torch.Tensor] | None = None
        self._loss = torch.zeros((), device=self.device)

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def step(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Train on ids and targets [B, T]; the loss, which the next step overwrites."""
        if self.device.type != "cuda":
            return self._step(ids, targets)
        if self._inputs is None:
            self._capture(ids, targets)
        for mine, given in zip(self._inputs, (ids, targets)):
            mine.copy_(given)
        self._graph.replay()
        return self._loss

    def _step(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            logits = self.model(input_ids=ids, use_cache=False).logits
        loss = self.loss_of(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    def _capture(self, ids: torch.Tensor, targets: torch.Tensor) -> None:
        """Steps of warm-up, which train as well, then the graph."""
        self._inputs = (ids.clone(), targets.clone())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._loss.copy_(self._step(*self._inputs))
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss.copy_(self._step(*self._inputs))


__all__ = ["CapturedTraining"]
