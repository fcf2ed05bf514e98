"""Passes on a traced graph that make it cheaper to run, and leave its outputs equal up to rounding (under 1e-5).

    lighten(program.module())      # the copy inside the program; the model that was traced stays as it is

Each pass looks for operators, not for models: it works on ours and on other libraries', and skips what it does not recognise.

    norms       a batch norm goes into the convolution beside it
    scales      a factor per channel after a linear layer goes into its weight, gamma (W x) = (gamma W) x
    resizing    bicubic resizing between fixed sizes is two constant matrices, A x B^T
    reading     rows that are not used are not computed: the last block of a model that reads its class token needs one query and one row
    attention   one projection for each of q, k and v, without the parts that softmax ignores
    pieces      layers that work on each token alone take the tokens in pieces, so that an MLP's wide hidden tensor stays in the cache
"""

from __future__ import annotations

from torch.fx import GraphModule

from vitarium.efficiency.graphs.attention import split_projections
from vitarium.efficiency.graphs.editing import Editor
from vitarium.efficiency.graphs.folding import fold_norms, fold_scales, resize_by_products
from vitarium.efficiency.graphs.pieces import work_in_pieces
from vitarium.efficiency.graphs.reading import read_less

PASSES = (fold_norms, fold_scales, resize_by_products, read_less, split_projections, read_less, work_in_pieces)


def lighten(module: GraphModule) -> GraphModule:
    """Apply all passes in place to the graph of `ExportedProgram.module()`, and return it."""
    editor = Editor(module)
    editor.clean()
    for run in PASSES:
        run(editor)
        editor.clean()
    module.recompile()
    return module
