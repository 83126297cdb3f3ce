"""
Shorter ways that the fused engine doesn't take, as their last bits differ, and two that it takes.

Each is compared with what autograd and the optimiser run, over many random shapes: the share of cases with equal bits, and the
time at the defaults (64 samples, 17 observations, 64 units). Run it with ``python -m benchmarks.attempts``, about a minute.
"""

import itertools
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch as th

from benchmarks.tables import markdown

Ways = tuple[Callable[[], Any], Callable[[], Any]]
SAMPLES, SIZES = (1, 3, 7, 64, 100, 256, 2048), (1, 5, 17, 64, 100, 376)
ATEN = th.ops.aten


def both_networks_at_once(n: int, n_in: int, n_out: int) -> Ways:
    """First layers of actor and critic as one product of matrices."""
    x, weight, bias = th.randn(n, n_in), th.randn(2 * n_out, n_in), th.randn(2 * n_out)
    parts = [(bias[rows].clone(), weight[rows].clone()) for rows in (slice(n_out), slice(n_out, None))]
    return lambda: [th.addmm(b, x, w.t()) for b, w in parts], lambda: th.addmm(bias, x, weight.t()).split(n_out, dim=1)  # type: ignore[no-untyped-call]


def batched_layers(n: int, n_in: int, n_out: int) -> Ways:
    """Second layers of actor and critic as one batched product."""
    x, weight, bias = th.randn(2, n, n_in), th.randn(2, n_out, n_in), th.randn(2, 1, n_out)
    layers = [(bias[i, 0], x[i], weight[i].t()) for i in (0, 1)]
    return lambda: [th.addmm(*layer) for layer in layers], lambda: th.baddbmm(bias, x, weight.transpose(1, 2))


def batched_gradients(n: int, n_in: int, n_out: int) -> Ways:
    """Gradients of both networks' weights as one batched product."""
    x, grad = th.randn(2, n, n_in), th.randn(2, n, n_out)
    inputs, grads = list(x), [each.t() for each in grad]
    return lambda: [th.mm(g, each) for g, each in zip(grads, inputs, strict=True)], lambda: th.bmm(grad.transpose(1, 2), x)


def torchs_fused_adam(n: int, n_in: int, n_out: int) -> Ways:
    """``torch._fused_adam_`` in place of seven operations on flat vectors (times with a copy of the state)."""
    size = n_in * n_out
    values, grad, exp_avg, exp_avg_sq = th.randn(size), th.randn(size), th.randn(size) * 0.1, th.rand(size) * 0.01

    def plain() -> list[th.Tensor]:
        new, first, second = values.clone(), exp_avg.clone(), exp_avg_sq.clone()
        first.lerp_(grad, 1 - 0.9)
        second.mul_(0.999).addcmul_(grad, grad, value=1 - 0.999)
        denominator = second.sqrt().div_((1 - 0.999**7) ** 0.5).add_(1e-5)
        return [new.addcdiv_(first, denominator, value=-(3e-4 / (1 - 0.9**7)))]

    def fused() -> list[th.Tensor]:
        new, first, second = values.clone(), exp_avg.clone(), exp_avg_sq.clone()
        settings = {"lr": 3e-4, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-5}
        adam: Any = th._fused_adam_
        adam([new], [grad], [first], [second], [], [th.tensor(7.0)], amsgrad=False, maximize=False, **settings)
        return [new]

    return plain, fused


def joined_biases(n: int, n_in: int, n_out: int) -> Ways:
    """Gradients of both networks' biases as one sum; taken."""
    grad = th.randn(2, n, n_out)
    grads = list(grad)
    return lambda: [each.sum(0) for each in grads], lambda: grad.sum(1)


def joined_tanh(n: int, n_in: int, n_out: int) -> Ways:
    """Both networks' tanh at once; taken."""
    x = th.randn(2, n, n_out)
    inputs = [each.clone() for each in x]
    return lambda: [each.tanh() for each in inputs], x.tanh


def joined_sigmoid(n: int, n_in: int, n_out: int) -> Ways:
    """Both networks' sigmoid at once."""
    x = th.randn(2, n, n_out)
    inputs = [each.clone() for each in x]
    return lambda: [each.sigmoid() for each in inputs], x.sigmoid


WAYS = (
    both_networks_at_once,
    batched_layers,
    batched_gradients,
    torchs_fused_adam,
    joined_sigmoid,
    joined_biases,
    joined_tanh,
)


def rows() -> Iterator[tuple[str, ...]]:
    """One row a way."""
    for way in WAYS:
        cases = [way(*sizes) for sizes in itertools.product(SAMPLES, SIZES, SIZES)]
        equal = [all(map(th.equal, reference(), other())) for reference, other in cases]
        times = [min(timeit.repeat(each, number=500, repeat=5)) / 500 * 1e6 for each in way(64, 17, 64)]
        title = str(way.__doc__).rstrip(".")
        yield (title, f"{np.mean(equal):.1%} of {len(equal)}", f"{times[0]:.1f}", f"{times[1]:.1f}")


def main() -> None:
    """Print the table."""
    th.manual_seed(0)
    th.set_num_threads(1)
    header = ("way", "equal bits", "us as it is", "us so")
    with th.inference_mode():
        print(markdown([header, *rows()]))


if __name__ == "__main__":
    main()
