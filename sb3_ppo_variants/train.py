"""``python -m sb3_ppo_variants.train``: the RL Zoo's training command with our algorithms, and all of its options."""

from sb3_ppo_variants.zoo import register


def main() -> None:
    """
    Train, continue or search as the command line says.

    :raises ImportError: if the RL Zoo is not installed
    :raises ValueError: if an environment or a hyperparameter is unknown
    """
    register()
    import rl_zoo3.train

    from sb3_ppo_variants.zoo.manager import Manager

    rl_zoo3.train.ExperimentManager = Manager  # type: ignore[attr-defined]  # there is no option for it
    rl_zoo3.train.train()


if __name__ == "__main__":
    main()
