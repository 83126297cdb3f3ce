"""
What an update costs with many ranks: a model with few numbers, fitted to measurements.

An update takes the time of its rollout, of the computation for its minibatches, and of the all-reduce behind each of them.
Assumptions: every rank has a core, or a GPU, of its own; the gradient's parts go around in a ring (Patarasuk and Yuan 2009,
"Bandwidth optimal all-reduce algorithms for clusters of workstations"), of 2 (k - 1) messages of 1 / k of the bytes for k
ranks; a message takes a latency, and its bytes by a bandwidth; all wait for the slowest rank, whose rollout takes longer than
the mean by the expected maximum of as many normal deviates, and so does each of its minibatches; nothing overlaps. The ring is
gloo's; NCCL also knows trees, which need 2 log2 k messages.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls
from scipy.stats import norm


class Network(NamedTuple):
    """
    What a message costs.

    :param latency: of one message, in seconds
    :param bandwidth: in bytes a second
    """

    latency: float
    bandwidth: float


class UpdateCost(NamedTuple):
    """
    What one rank does for an update.

    :param rollout: seconds of its environments and of acting in them
    :param compute: seconds of all its minibatches' gradients and steps, without communication
    :param n_reductions: all-reduces of the gradient
    :param n_bytes: of a gradient
    :param n_others: other exchanges, of a few bytes: statistics of advantages and observations, KL, logs, checks
    :param rollout_std: standard deviation of the rollout's seconds
    :param step_std: standard deviation of the seconds that a rank takes from one all-reduce of the gradient to the next
    """

    rollout: float
    compute: float
    n_reductions: int
    n_bytes: int
    n_others: int = 0
    rollout_std: float = 0.0
    step_std: float = 0.0


def all_reduce_seconds(n_ranks: int, n_bytes: int, network: Network) -> float:
    """
    Of one all-reduce in a ring.

    :param n_ranks: k
    :param n_bytes: of the vector
    :param network: what a message costs
    """
    n_messages = 2 * (n_ranks - 1)
    return n_messages * (network.latency + n_bytes / n_ranks / network.bandwidth)


def fit_network(n_ranks: int, n_bytes: Sequence[int], seconds: Sequence[float]) -> Network:
    """
    The network that explains measured all-reduces best, by least squares of relative errors.

    :param n_ranks: that have taken part
    :param n_bytes: of each measured vector
    :param seconds: that its all-reduce has taken
    """
    n_messages, sizes, times = 2 * (n_ranks - 1), np.asarray(n_bytes, dtype=float), np.asarray(seconds)
    terms = np.stack([np.full(len(sizes), float(n_messages)), n_messages * sizes / n_ranks], axis=1)
    (latency, seconds_per_byte), _ = nnls(terms / times[:, None], np.ones(len(sizes)))
    return Network(float(latency), float(1 / seconds_per_byte) if seconds_per_byte > 0 else np.inf)


def update_seconds(n_ranks: int, cost: UpdateCost, network: Network) -> float:
    """
    Of an update with many ranks.

    :param n_ranks: k
    :param cost: what each of them does
    :param network: what a message costs
    """
    waiting = waiting_seconds(n_ranks, cost)
    return cost.rollout + cost.compute + waiting + communication_seconds(n_ranks, cost, network)


def waiting_seconds(n_ranks: int, cost: UpdateCost) -> float:
    """
    What of it a rank waits, on average, for the slowest.

    :param n_ranks: k
    :param cost: what each of them does
    """
    return slowest(n_ranks) * (cost.rollout_std + cost.n_reductions * cost.step_std)


def slowest(n_ranks: int) -> float:
    """
    The expected maximum of as many standard normal deviates (Blom 1958, "Statistical estimates and transformed
    beta-variables").

    :param n_ranks: how many
    """
    return float(norm.ppf((n_ranks - 0.375) / (n_ranks + 0.25)))


def with_waiting(cost: UpdateCost, network: Network, n_ranks: int, measured: float) -> UpdateCost:
    """
    The cost whose ``step_std`` explains what ranks have been seen to wait.

    :param cost: what each rank does
    :param network: what a message costs
    :param n_ranks: that have been measured
    :param measured: seconds of an update that each of them has communicated or waited, on average
    """
    explained = communication_seconds(n_ranks, cost, network) + waiting_seconds(n_ranks, cost._replace(step_std=0.0))
    return cost._replace(step_std=max(0.0, measured - explained) / slowest(n_ranks) / cost.n_reductions)


def communication_seconds(n_ranks: int, cost: UpdateCost, network: Network) -> float:
    """
    What of it is communication.

    :param n_ranks: k
    :param cost: what each of them does
    :param network: what a message costs
    """
    gradients = cost.n_reductions * all_reduce_seconds(n_ranks, cost.n_bytes, network)
    return gradients + cost.n_others * all_reduce_seconds(n_ranks, 0, network)


def efficiency(n_ranks: int, cost: UpdateCost, network: Network) -> float:
    """How many times as many samples a second as one rank's, divided by the number of ranks."""
    return update_seconds(1, cost, network) / update_seconds(n_ranks, cost, network)


def most_ranks(least_efficiency: float, cost: UpdateCost, network: Network) -> int:
    """
    How many ranks can take part before the network takes too large a share.

    :param least_efficiency: from 0 to 1
    :param cost: what each rank does
    :param network: what a message costs
    :return: that number, at most a million
    """
    low, high = 1, 2**20
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if efficiency(middle, cost, network) >= least_efficiency else (low, middle - 1)
    return low
