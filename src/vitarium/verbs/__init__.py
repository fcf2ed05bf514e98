"""One function a command, with typed arguments and a result object: `vitarium.verbs.evaluate.evaluate` is `vitarium.evaluate`.

The commands are thin skins over these functions: options, progress, tables.
"""
