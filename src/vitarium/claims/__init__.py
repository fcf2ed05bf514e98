"""One small honest experiment per system, and the ledger of the outcomes.

A file `claims/<slug>.py` holds one function under `@claim`; it says what to compare, and the runner keeps the comparison fair: the same
data, budget and seeds for both arms, trained by the same loop.
"""

from vitarium.claims.experiment import Arm, Comparison, Measured, claim, claimed_slugs, find_claim
from vitarium.claims.ledger import Entry, read_ledger
from vitarium.claims.run import run_claim, run_claims

__all__ = ["Arm", "Comparison", "Entry", "Measured", "claim", "claimed_slugs", "find_claim", "read_ledger", "run_claim", "run_claims"]
