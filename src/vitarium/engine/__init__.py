"""Execution of many independent runs, or processing of many images, on this machine or on a Ray cluster.

`run_all` works on runs (a model of a comparison, a claim), `map_images` on parts of a long list of images. Both are independent of models:
they call picklable functions, write atomically, skip work that any engine has finished, and return the same results on every engine.

One training over several devices or machines is left to Lightning Fabric (`training.fit`).
"""

from vitarium.engine.images import map_images
from vitarium.engine.jobs import Job
from vitarium.engine.runs import Outcome, RunEvent, run_all
from vitarium.engine.settings import Engine, as_engine

__all__ = ["Engine", "Job", "Outcome", "RunEvent", "as_engine", "map_images", "run_all"]
