"""`python -m minipyramid.bench`: prompts and generation timed, against this machine's limits and others."""
