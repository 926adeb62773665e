"""`train_free_demo.py`: the full cache and another policy on the same prompts, and what was kept."""
