"""Scenes: drawn pictures that carry every label a vision task needs, endless, fast, and the same for the same seed and number.

| file | holds |
|---|---|
| shapes.py | outlines of things |
| layout.py | the vocabulary; what a scene contains and where it stands |
| render.py | layout -> picture, depth, semantic and instance maps |
| language.py | captions, questions and answers |
| scene.py | `Scenes`, and `Scene` with all labels |
| same_shape.py | the pictures of the task same_shape |
| actions.py | the clips of the task action |
| thorax.py | the X-rays of the task thorax |
| tasks.py | scenes as image sets for classification |

A new kind of picture (clips, views, strips, text lines, ...) is a file beside same_shape.py that draws from the same shapes.
"""

from vitarium.data.scenes.language import ANSWERS
from vitarium.data.scenes.layout import CATEGORIES, STUFF, THINGS, Thing
from vitarium.data.scenes.scene import Scene, Scenes
from vitarium.data.scenes.tasks import open_scenes

__all__ = ["ANSWERS", "CATEGORIES", "STUFF", "THINGS", "Scene", "Scenes", "Thing", "open_scenes"]
