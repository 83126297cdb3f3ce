"""
Optuna without the RL Zoo: a search for the target, the first coefficient and the learning rate of PPOKL on CartPole-v1.

A trial is worth its mean return over the whole training, so that fast learners win. It is ended where, at the same time step,
most of the trials before were better. The best trial's values are printed.
"""

import optuna
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_variants import PPOKL


class PruningCallback(EvalCallback):
    """Tells the trial the mean of all evaluations so far, and ends it if the pruner says so."""

    def __init__(self, trial: optuna.Trial, eval_freq: int) -> None:
        super().__init__(make_vec_env("CartPole-v1", n_envs=4, seed=1), eval_freq=eval_freq, n_eval_episodes=8, verbose=0)
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
        model = PPOKL(
            "MlpPolicy",
            make_vec_env("CartPole-v1", n_envs=8, seed=0),
            n_steps=64,
            batch_size=256,
            learning_rate=trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
            kl_coef=f"auto_{trial.suggest_float('kl_coef_initial', 0.1, 10.0, log=True)}",
            kl_target=trial.suggest_float("kl_target", 0.003, 0.1, log=True),
            seed=0,
            device="cpu",
        )
        callback = PruningCallback(trial, eval_freq=timesteps // 80)
        model.learn(timesteps, callback=callback)
        return callback.value

    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=timesteps // 4)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0), pruner=pruner)
    study.optimize(objective, n_trials=n_trials)
    print(f"best mean return during training: {study.best_value:.0f}, with {study.best_params}")
    return study


if __name__ == "__main__":
    main()
