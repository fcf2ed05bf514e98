"""One view of any plain vision transformer: the interface through which methods access the inside of a model.

    view = anatomy.of(model)                   # timm's, transformers', ours
    view.blocks[3].attention.qkv(x)            # the parts, under one set of names
    install(model, sites)                      # call a method at fixed places of each block
    with anatomy.masked(model, mask): ...      # images of different token counts in one batch

Methods for any network (quantizers, pruners) do not need it: they replace modules by name.
"""

from vitarium.anatomy.finding import of
from vitarium.anatomy.parts import Anatomy, AttentionView, BlockView
from vitarium.anatomy.sites import Attended, Site, SitedBlock, install, masked, run
from vitarium.anatomy.tokens import Tokens, carried

__all__ = ["Anatomy", "Attended", "AttentionView", "BlockView", "Site", "SitedBlock", "Tokens", "carried", "install", "masked", "of", "run"]
