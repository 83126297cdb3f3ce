"""
Optuna without the RL Zoo (`pip install optuna`, or the extra `zoo`): a search for the target, the first coefficient and the
learning rate of PPOKL on CartPole-v1.

A trial is worth its mean return over ten evaluations during training, so that fast learners win. After each evaluation it
reports the mean of those so far, and is pruned if the best that it has reported is below the median of what the completed
trials had reported at that time step; not in the first quarter of a training, nor before five trials are completed.

The best trial's values are printed. All trials have one and the same seed, so that the best of many owes something to luck:
train with other seeds before you rely on it.
"""

from contextlib import closing

import optuna
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_variants import PPOKL

ENV = "CartPole-v1"
N_ENVS = 8


class PruningCallback(EvalCallback):
    """Tells the trial the mean of all evaluations so far, and ends it if the pruner says so."""

    def __init__(self, trial: optuna.Trial, eval_env: VecEnv, eval_freq: int) -> None:
        super().__init__(eval_env, eval_freq=eval_freq, n_eval_episodes=8, verbose=0)
        self.trial = trial
        self.returns: list[float] = []

    def _on_step(self) -> bool:
        go_on = super()._on_step()
        if self.n_calls % self.eval_freq == 0:
            self.returns.append(self.last_mean_reward)
            self.trial.report(self.value, step=self.num_timesteps)
            if self.trial.should_prune():
                raise optuna.TrialPruned
        return go_on

    @property
    def value(self) -> float:
        return sum(self.returns) / len(self.returns)


def main(n_trials: int = 30, timesteps: int = 40_000) -> optuna.Study:
    def objective(trial: optuna.Trial) -> float:
        arguments = {
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
            "kl_coef": f"auto_{trial.suggest_float('kl_coef_initial', 0.1, 10.0, log=True)}",
            "kl_target": trial.suggest_float("kl_target", 0.003, 0.1, log=True),
        }
        # Closed also when the trial is pruned, which is an exception.
        with closing(make_vec_env(ENV, N_ENVS, seed=0)) as env, closing(make_vec_env(ENV, N_ENVS, seed=1)) as eval_env:
            model = PPOKL("MlpPolicy", env, n_steps=64, batch_size=256, **arguments, seed=0, device="cpu")
            # In calls of the callback, at each of which all environments have made a step.
            callback = PruningCallback(trial, eval_env, eval_freq=max(timesteps // (10 * N_ENVS), 1))
            model.learn(timesteps, callback=callback)
        return callback.value

    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=timesteps // 4)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0), pruner=pruner)
    study.optimize(objective, n_trials=n_trials)
    print(f"best mean return during training: {study.best_value:.0f}, with {study.best_params}")
    return study


if __name__ == "__main__":
    main()
