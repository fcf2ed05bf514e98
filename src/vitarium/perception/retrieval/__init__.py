"""Finding pictures that are like a picture: what systems of metric learning share.

| file | holds |
|---|---|
| prompts.py | learned tokens in the attention of any plain ViT, and the head that makes embeddings |
| lora.py | low-rank additions to the attention's linear layers: the method `lora` |
| proxies.py | proxies of classes, plain and semantic, and the ProxyAnchor loss |
| metrics.py | recall@k and MAP@R |
| embedding.py | picture -> unit vector, with any image model |
| index.py | many pictures' vectors in a file, and the nearest ones |
| sheet.py | queries and what was found, drawn |
"""
