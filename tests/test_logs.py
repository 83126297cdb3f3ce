"""What stands in TensorBoard's files, read back with TensorBoard's own reader."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stable_baselines3
from stable_baselines3.common.logger import KVWriter, Logger, configure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from sb3_ppo_variants import PPO, PPOKL, TrustRegionLoggingCallback
from tests.environments import RandomEnv
from tests.test_ppo import Watch, make

ROLLOUT = 48
SB3_KEYS = {
    *("train/approx_kl", "train/clip_fraction", "train/clip_range", "train/entropy_loss", "train/explained_variance"),
    *("train/learning_rate", "train/loss", "train/policy_gradient_loss", "train/std", "train/value_loss"),
    *("rollout/ep_len_mean", "rollout/ep_rew_mean", "time/fps"),
}
OWN_KEYS = {
    *("train/kl", "train/kl_max", "train/kl_per_epoch", "train/kl_coef", "train/kl_penalty_loss", "train/grad_norm"),
    *("train/gradient_steps", "train/stopped_epoch"),
}


def events(folder: Path) -> EventAccumulator:
    (run,) = folder.iterdir()
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    return accumulator.Reload()


def trained(folder: Path, algorithm: type[PPO] = PPO, callback: Any = None, **kwargs: Any) -> EventAccumulator:
    model = make(algorithm, tensorboard_log=str(folder), **kwargs)
    model.learn(3 * ROLLOUT, callback=callback)
    model.logger.close()
    return events(folder)


def scalars(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_keys(tmp_path: Path) -> None:
    assert set(trained(tmp_path).Tags()["scalars"]) == SB3_KEYS | OWN_KEYS


def test_keys_without_clipping(tmp_path: Path) -> None:
    expected = (SB3_KEYS | OWN_KEYS) - {"train/clip_fraction", "train/clip_range"}
    assert set(trained(tmp_path, PPOKL).Tags()["scalars"]) == expected


def test_kl_per_epoch_is_one_point_an_epoch(tmp_path: Path) -> None:
    """The mean of each epoch's minibatches, spread over the steps up to the one where the update's other values stand."""
    watch = Watch()
    accumulator = trained(tmp_path, callback=watch, n_epochs=3)
    points = scalars(accumulator, "train/kl_per_epoch")
    assert [step for step, _ in points] == [64, 80, 96, 112, 128, 144, 160, 176, 192]
    expected = np.concatenate([stats.kl_series().reshape(3, 3).mean(axis=1) for stats in watch.updates])
    np.testing.assert_allclose([value for _, value in points], expected, rtol=1e-5)
    # SB3 dumps an update's values after the next rollout.
    kls = scalars(accumulator, "train/kl")
    assert [step for step, _ in kls] == [96, 144]
    np.testing.assert_allclose([value for _, value in kls], watch.kls[:2], rtol=1e-6)


def test_histograms(tmp_path: Path) -> None:
    accumulator = trained(tmp_path, callback=TrustRegionLoggingCallback())
    assert set(accumulator.Tags()["histograms"]) == {"trust_region/ratio", "trust_region/kl"}
    for tag in ("trust_region/ratio", "trust_region/kl"):
        histograms = accumulator.Histograms(tag)
        assert [histogram.step for histogram in histograms] == [96, 144]
        assert all(histogram.histogram_value.num == ROLLOUT for histogram in histograms)
    means = [event.histogram_value.sum / ROLLOUT for event in accumulator.Histograms("trust_region/kl")]
    np.testing.assert_allclose(means, [value for _, value in scalars(accumulator, "train/kl")], rtol=1e-4)


def test_histograms_every_so_many_updates(tmp_path: Path) -> None:
    accumulator = trained(tmp_path, callback=TrustRegionLoggingCallback(histogram_freq=2))
    assert [histogram.step for histogram in accumulator.Histograms("trust_region/kl")] == [144]


def test_custom_scalars_layout(tmp_path: Path) -> None:
    """Each category on a page of its own; each chart finds keys that are logged, and no others that look like them."""
    accumulator = trained(tmp_path, callback=TrustRegionLoggingCallback())
    (event,) = accumulator.Tensors(metadata.CONFIG_SUMMARY_TAG)
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["trust region", "losses", "return"]
    found = {
        chart.title: {key for key in SB3_KEYS | OWN_KEYS if any(re.search(tag, key) for tag in chart.multiline.tag)}
        for category in layout.category
        for chart in category.chart
    }
    assert all(found.values())
    assert found["KL(old || new) after the update"] == {"train/kl", "train/approx_kl"}
    assert found["sum"] == {"train/loss"}


def test_hyperparameters(tmp_path: Path) -> None:
    accumulator = trained(tmp_path, PPOKL, TrustRegionLoggingCallback(), learning_rate="lin_0.001", ent_coef=0.01)
    plugin = accumulator.summary_metadata["_hparams_/session_start_info"].plugin_data
    from tensorboard.plugins.hparams import plugin_data_pb2

    values = plugin_data_pb2.HParamsPluginData.FromString(plugin.content).session_start_info.hparams
    assert values["algorithm"].string_value == "PPOKL"
    assert values["kl_coef"].string_value == "auto"
    assert values["kl_target"].number_value == 0.01
    assert values["ent_coef"].number_value == 0.01
    assert "LinearSchedule(start=0.001" in values["learning_rate"].string_value


def test_other_outputs_get_scalars_only(tmp_path: Path) -> None:
    """Histograms, layout and hyperparameters would break SB3's text, JSON and CSV outputs."""
    model = make()
    model.set_logger(configure(str(tmp_path), ["stdout", "log", "json", "csv"]))
    model.learn(3 * ROLLOUT, callback=TrustRegionLoggingCallback())
    model.logger.close()
    assert (tmp_path / "progress.csv").read_text().count("\n") == 4
    assert "train/kl_max" in (tmp_path / "progress.json").read_text()


def test_outputs_of_users_get_numbers_only() -> None:
    """A user's own output may take every value for a number."""

    class Floats(KVWriter):
        def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
            assert all(isinstance(float(value), float) for value in key_values.values())

        def close(self) -> None:
            pass

    model = make()
    model.set_logger(Logger(None, [Floats()]))
    model.learn(3 * ROLLOUT, callback=TrustRegionLoggingCallback())


@pytest.mark.filterwarnings("ignore:the exact KL is not logged")
def test_logging_survives_what_sb3_survives(tmp_path: Path) -> None:
    """NaN rewards make NaN values under SB3 without an error, until the next rollout; here they are left out, if asked to."""

    class NanEnv(RandomEnv):
        def step(self, action: Any) -> Any:
            observation, _, *rest = super().step(action)
            return observation, math.nan, *rest

    kwargs = {"n_steps": 24, "batch_size": 24, "n_epochs": 1, "device": "cpu", "tensorboard_log": str(tmp_path)}
    for algorithm in (stable_baselines3.PPO, PPO):
        ours = algorithm is PPO
        model = algorithm("MlpPolicy", NanEnv(), **kwargs, **({"on_nonfinite": "skip"} if ours else {}))
        model.learn(24, callback=TrustRegionLoggingCallback() if ours else None)
        model.logger.dump(24)
        assert math.isfinite(model.policy.state_dict()["value_net.bias"]) == ours
