"""The commands of `mlhead`, one file each. `add(commands)` makes the parser; its default `run` is what it does."""

from . import data, demos, eval, export, info, predict, scenes, train

# In the order of `mlhead --help`.
COMMANDS = (train, eval, export, predict, scenes, data, demos, info)
