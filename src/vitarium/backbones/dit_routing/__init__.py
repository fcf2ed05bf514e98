"""DiT: each token chooses, at every depth, to be transformed, to be carried along, and to be passed on to the next scale.

"DiT: Efficient Vision Transformers with Dynamic Token Routing" (no relation to the diffusion transformer of that name). A pyramid is
unrolled into a grid of nodes: rows i are the scales 1/4 to 1/32, columns j are depths. Gates on a token's own features say which edges
it takes:

    z = W_2 GELU(W_1 LN_i(F_ij)), two numbers a token;  g = on where z_on > z_off, a gate for the row and another for the column
    H_i,j+1 = g_row B_ij(F_ij) + (1 - g_row) F_ij          B: blocks of PVTv2
    D_i+1,j = P_ij(g_col LN_i(F_ij))                       P: 3x3 of stride 2 and a norm; zero where none of a cell's inputs takes it
    F_ij    = H_ij + D_ij,  F_00 = patches of the image;   logits = W mean(LN(last column's coarsest node))

Inside B an untaken token is not changed, is no query, but is seen: keys, values and the depth-wise convolution read all tokens.
In training all is computed and blended by the gates, which are sampled (Gumbel-softmax, straight-through); a budget term keeps the cost
near a target (objective `dit_routing`):

    loss = task + w (cost / cost of all gates on - target)^2

In inference untaken work is not done: queries, outputs and MLPs are computed for gathered tokens alone, cells of P for those that are fed,
edges that no token of an image takes not at all. The cost counts what then runs, so that it equals the measured multiply-accumulates.
The authors published a figure and no code: the grid is theirs; gates, merging, budget and sizes are this library's reading. Blocks and
downsampling are PVTv2's, whose checkpoints (timm's names) fill the diagonal path: with its gates fixed (`fix_diagonal`) the model is PVTv2.
Any image size. Cost: at most (columns) times a PVTv2's of the same depths, times the share that is taken; quadratic in area / R^2.

Legend: B batch, N tokens of a scale, C channels, R side of the cell that one key stands for.

The house of files: `edges` (gates, blocks, downsampling, each masked and gathered), `model` (the grid), `objective` (training in a budget).
"""

from vitarium.backbones.dit_routing.edges import FixedGate, Gate
from vitarium.backbones.dit_routing.model import DiTRouting, Routes
from vitarium.backbones.dit_routing.objective import RoutingLearner

__all__ = ["DiTRouting", "FixedGate", "Gate", "Routes", "RoutingLearner"]
