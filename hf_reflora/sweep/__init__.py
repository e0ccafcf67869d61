"""Runs a recipe for every combination of some options, and says which setting of each method is best.

`plan` reads what is to be run, `runner` runs it, `outcomes` keeps one JSON line a run, `summary` compares the methods
in a table and `curves` in plots, and `command` is the command `hf-reflora sweep`.
"""
