"""Comparisons of the variants, each reproduced by one command."""

from benchmarks import cartpole_swingup

cartpole_swingup.register()
