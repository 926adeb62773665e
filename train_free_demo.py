"""`python train_free_demo.py`: the full cache and a pruned one on the same prompts; nothing is trained."""

import sys

from minipyramid.demo.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
