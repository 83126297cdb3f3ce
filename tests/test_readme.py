"""The README's Python blocks run as they stand, but for shorter trainings; its tables name what exists."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.variants import VARIANTS
from sb3_ppo_variants import PPO
from tests.test_logs import OWN_KEYS, SB3_KEYS

pytestmark = pytest.mark.slow

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block-{number}" for number in range(1, len(BLOCKS) + 1)])
def test_python_blocks(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shortened, n_trainings = re.subn(r"total_timesteps=[\d_]+", "total_timesteps=4096", block)
    assert n_trainings > 0
    names = {"__name__": "readme"}
    exec(compile(shortened, "README.md", "exec"), names)
    for model in names.values():
        if isinstance(model, PPO) and hasattr(model, "_logger"):  # TensorBoard's thread would go on writing to a relative path
            model.logger.close()


def test_there_are_blocks_to_run() -> None:
    assert len(BLOCKS) >= 4


def test_the_table_explains_every_key() -> None:
    explained = set(re.findall(r"`(\w+/[\w*]+)`", README))
    assert {key for key in SB3_KEYS | OWN_KEYS if key.startswith("train/")} <= explained


def test_every_new_argument_is_in_the_table() -> None:
    table = README.split("| new argument |")[1].split("\n\n")[0]
    keyword_only = [
        name
        for name, parameter in inspect.signature(PPO.__init__).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    assert keyword_only
    assert all(f"`{name}`" in table for name in keyword_only)


def test_the_table_of_variants_is_complete() -> None:
    table = README.split("| variant | is |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([\w.]+)`", table)) == set(VARIANTS)


def test_commands_of_comparisons_are_understood() -> None:
    commands = re.findall(r"^python -m benchmarks.compare (.*)$", README, re.M)
    assert commands
    for command in commands:
        assert compare._plan(shlex.split(command)).grid.jobs()


def test_links_are_not_dead() -> None:
    """Those to files, and those to headings of the README itself."""
    targets = re.findall(r"\]\((?!http)([^)]+)\)", README)
    headings = {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in re.findall(r"^#+ (.+)$", README, re.M)}
    assert targets
    for target in targets:
        assert target[1:] in headings if target.startswith("#") else (Path(__file__).parents[1] / target).exists(), target
