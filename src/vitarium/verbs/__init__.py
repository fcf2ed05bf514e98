"""One function per command, with typed arguments and a result object: `vitarium.verbs.evaluate.evaluate` is `vitarium.evaluate`.

The commands add only options, progress and tables to these functions.
"""
