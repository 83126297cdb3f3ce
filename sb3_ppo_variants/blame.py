"""Which of many environments has raised an exception: SB3's vector environments don't say."""

import traceback

from stable_baselines3.common.vec_env import DummyVecEnv


def stepped_environment(error: BaseException) -> int | None:
    """
    The environment in whose step, or in whose reset behind it, an exception was raised.

    :param error: the exception
    :return: its index in the ``DummyVecEnv``, ``None`` if it was raised elsewhere
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is DummyVecEnv.step_wait.__code__:
            index = frame.f_locals.get("env_idx")
            return index if isinstance(index, int) else None
    return None


def add_note(error: BaseException, note: str) -> None:
    """
    Append a note to an exception, which tracebacks show (from Python 3.11 on).

    :param error: the exception
    :param note: the note
    """
    error.__notes__ = [*getattr(error, "__notes__", []), note]
