"""`python -m minipyramid.calibrate`: what each layer of a checkpoint must compute and hold."""
