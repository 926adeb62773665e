"""`python -m minipyramid.eval`: what pruning costs, against the full cache and others at equal bytes."""
