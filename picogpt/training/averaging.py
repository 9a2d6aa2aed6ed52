"""Mean of the weights over the last steps: it stands in for a decay of the learning rate, at any step of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy.typing as npt
import torch

from picogpt.model.gpt import GPT

__all__ = ["WeightAverage"]

AVERAGE_SHARE = 0.1
"""Length of the mean as a fraction of the steps taken, at the peak of the learning rate."""
AVERAGE_INTERVAL = 4
"""Steps between two updates of the mean: each is a pass over all weights, and neighbours differ little."""


class WeightAverage:
    """Exponential moving average of a model's weights, over about the last tenth of the steps taken.

    While the learning rate is high, the weights jump about a point of lower loss, which a decay of the rate would bring them to.
    Their mean is close to it without a decay (Izmailov et al., arXiv 1803.05407). So its validation loss is about that of a run
    that was planned to end now. As the rate comes down the mean becomes shorter, in proportion: at rate zero it is the weights.

    Args:
        model: the model; its present weights are the first mean.
    """

    def __init__(self, model: GPT) -> None:
        self._model = model
        self._parameters = list(model.parameters())
        self._means = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self, step: int, fraction: float) -> None:
        """Take in the weights after a step.

        Args:
            step: steps taken.
            fraction: learning rate of the last one, as a fraction of the peak.
        """
        if step % AVERAGE_INTERVAL == 0:
            share = AVERAGE_INTERVAL / (AVERAGE_SHARE * step * fraction + AVERAGE_INTERVAL)
            for mean, parameter in zip(self._means, self._parameters, strict=True):
                mean.lerp_(parameter, share)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model its mean weights, and its own again at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # One weight after the other, so that no third copy of the model is needed.
        for parameter, mean in zip(self._parameters, self._means, strict=True):
            own = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(own)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the mean weights by name, as arrays that share their memory on a CPU."""
        names = self._model.arrays()
        return {name: mean.cpu().numpy() for name, mean in zip(names, self._means, strict=True)}

    def load_arrays(self, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        """Copy the weights of `arrays` into the mean.

        Raises:
            RunError: they have another shape; nothing is changed.
        """
        with self.applied():
            self._model.load_arrays(weights)
