"""Scenes: rendered images with the labels of every vision task, unlimited in number, fast, and deterministic in seed and index.

| file | holds |
|---|---|
| shapes.py | outlines of objects |
| layout.py | the vocabulary; the content of a scene and its positions |
| render.py | layout -> image, depth, semantic and instance maps |
| language.py | captions, questions and answers |
| scene.py | `Scenes`, and `Scene` with all labels |
| same_shape.py | images of the task same_shape |
| far_sum.py, textures.py, two_scales.py | images of the tasks of these names, each of which needs a mechanism |
| size_transfer.py, fine_parts.py, tissue.py | more of them |
| actions.py | clips of the task action |
| thorax.py | X-rays of the task thorax |
| tasks.py | scenes as image sets for classification |

A new kind of image (clips, views, strips, text lines, ...) is a file beside same_shape.py that draws from the same shapes.
"""

from vitarium.data.scenes.language import ANSWERS
from vitarium.data.scenes.layout import CATEGORIES, STUFF, THINGS, Thing
from vitarium.data.scenes.scene import Scene, Scenes
from vitarium.data.scenes.tasks import open_scenes

__all__ = ["ANSWERS", "CATEGORIES", "STUFF", "THINGS", "Scene", "Scenes", "Thing", "open_scenes"]
