"""Models that understand images: what is where, and what belongs together.

| file | holds |
|---|---|
| pyramid.py | maps of four sizes from any backbone, by name |
| matching.py | bipartite matching of predictions and targets, and its costs |
| set_losses.py | the set criterion and its terms |
| masks.py | what queries with classes and masks mean: panoptic, instance and semantic maps |
| segmentation.py | the learner of every segmenter: data, metrics, overlays |
| overlay.py | maps drawn over pictures |
| retrieval/ | finding pictures: prompts and additions, proxies, metrics, the index |

A system is a file or folder of its own name beside these.
"""
