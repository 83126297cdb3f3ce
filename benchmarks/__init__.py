"""Comparisons of the variants, each reproduced by one command."""
