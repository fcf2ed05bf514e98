"""DiT: dynamic token routing, where each token is transformed, carried over, or passed on to the next scale at every depth.

"DiT: Efficient Vision Transformers with Dynamic Token Routing" (unrelated to the diffusion transformer of that name). A pyramid is unrolled
into a grid of nodes: rows i are the scales 1/4 to 1/32, columns j are depths. Gates computed from the features of a token select its edges:

    z = W_2 GELU(W_1 LN_i(F_ij)), two numbers per token;  g = on where z_on > z_off, a gate for the row and another for the column
    H_i,j+1 = g_row B_ij(F_ij) + (1 - g_row) F_ij          B: blocks of PVTv2
    D_i+1,j = P_ij(g_col LN_i(F_ij))                       P: 3x3 of stride 2 and a norm; zero where no input of a cell is selected
    F_ij    = H_ij + D_ij,  F_00 = patches of the image;   logits = W mean(LN(last column's coarsest node))

Inside B, tokens that are not selected are unchanged and form no queries, but keys, values and the depth-wise convolution read all tokens.
In training everything is computed and blended by sampled gates (Gumbel-softmax, straight-through); a budget term keeps the cost near a
target (learner `dit_routing`):

    loss = task + w (cost / cost of all gates on - target)^2

In inference only selected work is done: queries, outputs and MLPs are computed for gathered tokens, cells of P if they have a selected
input, and edges that no token of an image selects are skipped. The cost counts the same work, so that it equals the measured
multiply-accumulates. The authors published a figure and no code: the grid follows it; gates, merging, budget and sizes are this library's
interpretation. Blocks and downsampling are those of PVTv2, whose checkpoints (timm's names) load into the diagonal path: with its gates
fixed (`fix_diagonal`) the model equals PVTv2. Any image size.
Cost: at most (columns) times that of PVTv2 of the same depths, times the selected share; quadratic in area / R^2.

Legend: B batch, N tokens of a scale, C channels, R reduction of the sides of the map for keys and values.

Files: `edges` (gates, blocks, downsampling, each masked and gathered), `model` (the grid), `objective` (training with a budget).
"""

from vitarium.backbones.dit_routing.edges import FixedGate, Gate
from vitarium.backbones.dit_routing.model import DiTRouting, Routes
from vitarium.backbones.dit_routing.objective import RoutingLearner

__all__ = ["DiTRouting", "FixedGate", "Gate", "Routes", "RoutingLearner"]
