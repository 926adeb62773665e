"""`python train_free_demo.py`: the full cache and the pyramid on the same prompt; nothing is trained."""

import sys

from minipyramid.demo.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
