"""What systems that restore pictures share: the network's contract, the learner, tiling, metrics."""
