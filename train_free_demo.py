"""`python train_free_demo.py`: the full cache and the pyramid on the same prompt, side by side; nothing is trained."""

import sys

from minipyramid.demo import main

if __name__ == "__main__":
    sys.exit(main())
