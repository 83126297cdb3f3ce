"""``python -m sb3_ppo_variants.enjoy``: the RL Zoo's command that shows a trained agent, with our algorithms."""

from sb3_ppo_variants.zoo import register


def main() -> None:
    """
    Show an agent as the command line says.

    :raises ImportError: if the RL Zoo is not installed
    """
    register()
    from rl_zoo3.enjoy import enjoy

    enjoy()


if __name__ == "__main__":
    main()
