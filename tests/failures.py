"""Ways in which generation is interrupted: a streamer, a logits processor and a stopping rule that raise."""

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer


class Injected(Exception):
    """Raised by the tests."""


class Stops(BaseStreamer):
    """Raises when it is given more than `left` tokens; `seen` are those that it took, without the prompt."""

    def __init__(self, left):
        self.left, self.seen, self.had_prompt = left, [], False

    def put(self, value):
        if not self.had_prompt:
            self.had_prompt = True
        elif len(self.seen) + value.numel() > self.left:
            raise KeyboardInterrupt
        else:
            self.seen += value.flatten().tolist()

    def end(self):
        pass


def raises_at(length):
    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] >= length:
                raise Injected
            return scores

    return LogitsProcessorList([Fails()])


def rule_raises_at(length):
    class Fails(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] >= length:
                raise Injected
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    return StoppingCriteriaList([Fails()])
