"""The model of what an update costs with many ranks, by hand."""

import math

import numpy as np
import pytest

from benchmarks.cost_model import (
    Network,
    UpdateCost,
    all_reduce_seconds,
    efficiency,
    fit_network,
    most_ranks,
    slowest,
    update_seconds,
    with_waiting,
)

NETWORK = Network(latency=1e-3, bandwidth=1e6)


@pytest.mark.parametrize(("n_ranks", "seconds"), [(1, 0.0), (2, 2 * (1e-3 + 4e-3 / 2)), (4, 6 * (1e-3 + 4e-3 / 4))])
def test_all_reduce_in_a_ring(n_ranks: int, seconds: float) -> None:
    """2 (k - 1) messages of 4,000 / k bytes each; 4,000 bytes take 4 ms."""
    assert all_reduce_seconds(n_ranks, 4000, NETWORK) == pytest.approx(seconds)


def test_an_update() -> None:
    """0.5 s + 0.1 s + 10 all-reduces of 6 ms, as above for two ranks."""
    cost = UpdateCost(rollout=0.5, compute=0.1, n_reductions=10, n_bytes=4000)
    assert update_seconds(1, cost, NETWORK) == pytest.approx(0.6)
    assert update_seconds(2, cost, NETWORK) == pytest.approx(0.66)
    assert efficiency(2, cost, NETWORK) == pytest.approx(0.6 / 0.66)


def test_small_exchanges_cost_their_messages() -> None:
    """Of four ranks, 6 messages of 1 ms, 5 times."""
    cost = UpdateCost(rollout=0.0, compute=0.0, n_reductions=0, n_bytes=4000, n_others=5)
    assert update_seconds(4, cost, NETWORK) == pytest.approx(5 * 6e-3)


def test_all_wait_for_the_slowest() -> None:
    """Once after the rollout, and at each of ten all-reduces."""
    network = Network(latency=0.0, bandwidth=math.inf)
    cost = UpdateCost(rollout=1.0, compute=0.0, n_reductions=10, n_bytes=0, rollout_std=0.1, step_std=0.02)
    assert update_seconds(1, cost, network) == pytest.approx(1.0)
    assert update_seconds(8, cost, network) == pytest.approx(1.0 + (0.1 + 10 * 0.02) * slowest(8))


@pytest.mark.parametrize("n_ranks", [1, 2, 8, 1024])
def test_the_slowest_of_many(n_ranks: int) -> None:
    """The mean of the largest of so many normal deviates, by drawing them."""
    largest = np.random.default_rng(0).standard_normal((5000, n_ranks)).max(axis=1)
    assert slowest(n_ranks) == pytest.approx(largest.mean(), abs=0.05)


def test_waiting_is_found_from_what_it_does() -> None:
    """All of 2 s that isn't explained by ten messages there and back."""
    cost = UpdateCost(rollout=0.5, compute=0.1, n_reductions=10, n_bytes=0)
    found = with_waiting(cost, NETWORK, 2, 2.0)
    assert found.step_std == pytest.approx((2.0 - 10 * 2e-3) / slowest(2) / 10)
    assert update_seconds(2, found, NETWORK) == pytest.approx(0.6 + 2.0)
    assert with_waiting(cost, NETWORK, 2, 0.01).step_std == 0.0


def test_most_ranks_is_where_efficiency_is_still_enough() -> None:
    cost = UpdateCost(rollout=0.5, compute=0.1, n_reductions=10, n_bytes=4000)
    most = most_ranks(0.5, cost, NETWORK)
    assert efficiency(most, cost, NETWORK) >= 0.5 > efficiency(most + 1, cost, NETWORK)


@pytest.mark.parametrize("n_ranks", [2, 5])
def test_a_network_is_found_from_what_it_does(n_ranks: int) -> None:
    sizes = [100, 10_000, 1_000_000]
    network = fit_network(n_ranks, sizes, [all_reduce_seconds(n_ranks, size, NETWORK) for size in sizes])
    assert network == pytest.approx(NETWORK)
