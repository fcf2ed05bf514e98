"""Image understanding: segmentation and retrieval.

| file | holds |
|---|---|
| pyramid.py | maps of four sizes from any backbone, by name |
| matching.py | bipartite matching of predictions and targets, and its costs |
| set_losses.py | the set criterion and its terms |
| masks.py | queries with classes and masks -> panoptic, instance and semantic maps |
| segmentation.py | the task, and the base of its learners |
| overlay.py | maps drawn over images |
| retrieval/ | image retrieval: prompts and adapters, proxies, metrics, the index |

Each other file or folder is a system.
"""
