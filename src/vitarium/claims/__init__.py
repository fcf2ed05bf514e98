"""One small experiment per system, and the ledger of the outcomes.

A file `claims/<slug>.py` holds one function under `@claim`; it returns the comparisons, and the runner gives both arms the same data,
budget, seeds and training loop.
"""

from vitarium.claims.experiment import Arm, Comparison, Measured, claim, claimed_slugs, find_claim
from vitarium.claims.judging import Range
from vitarium.claims.ledger import Entry, read_ledger
from vitarium.claims.run import run_claim, run_claims

__all__ = [
    "Arm",
    "Comparison",
    "Entry",
    "Measured",
    "Range",
    "claim",
    "claimed_slugs",
    "find_claim",
    "read_ledger",
    "run_claim",
    "run_claims",
]
