"""Image retrieval: components shared by systems of metric learning.

| file | holds |
|---|---|
| prompts.py | learned tokens in the attention of any plain ViT, and an embedding head |
| lora.py | low-rank adapters of the attention's linear layers: the method `lora` |
| proxies.py | proxies of classes, plain and semantic, and the ProxyAnchor loss |
| metrics.py | recall@k and MAP@R |
| embedding.py | image -> unit vector, with any image model |
| index.py | a file of many images' vectors, and nearest-neighbour search |
| sheet.py | drawings of queries with their results |
"""
