"""Torch's distributions, built when somebody looks at them: SB3 leaves one behind on every step, and hardly anybody looks."""

from typing import Any

import numpy as np
import torch as th
from torch.distributions import Bernoulli, Categorical, Distribution, Normal


class _Deferred(Distribution):
    """Becomes the distribution that it stands for, in class and content, as soon as an attribute is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._build(), name)

    def _build(self) -> Distribution:
        content = dict(vars(self))
        vars(self).clear()
        return self._become(**content)

    def _become(self, **content: np.ndarray) -> Distribution:
        raise NotImplementedError


class DeferredNormal(_Deferred, Normal):
    """
    ``Normal`` as SB3's Gaussian builds it.

    :param mean: shape (b, action_dim)
    :param sigma: shape (action_dim,)
    """

    def __init__(self, mean: np.ndarray, sigma: np.ndarray) -> None:
        vars(self).update(mean=mean, sigma=sigma)

    def _become(self, **content: np.ndarray) -> Distribution:
        self.__class__ = Normal  # type: ignore[assignment]
        mean = th.from_numpy(content["mean"])
        Normal.__init__(self, mean, th.ones_like(mean) * th.from_numpy(content["sigma"]))
        return self


class _DeferredLogits(_Deferred):
    def __init__(self, logits: np.ndarray) -> None:
        vars(self).update(raw=logits)

    # These two are no attributes but descriptors, which would ask each other.
    @property
    def logits(self) -> Any:
        return self._build().logits  # type: ignore[attr-defined]

    @property
    def probs(self) -> Any:
        return self._build().probs  # type: ignore[attr-defined]


class DeferredCategorical(_DeferredLogits, Categorical):
    """
    ``Categorical``.

    :param logits: not normalised, shape (b, n_actions)
    """

    def _become(self, **content: np.ndarray) -> Distribution:
        self.__class__ = Categorical  # type: ignore[assignment]
        Categorical.__init__(self, logits=th.from_numpy(content["raw"]))
        return self


class DeferredBernoulli(_DeferredLogits, Bernoulli):
    """
    ``Bernoulli``.

    :param logits: shape (b, action_dim)
    """

    def _become(self, **content: np.ndarray) -> Distribution:
        self.__class__ = Bernoulli  # type: ignore[assignment]
        Bernoulli.__init__(self, logits=th.from_numpy(content["raw"]))
        return self
