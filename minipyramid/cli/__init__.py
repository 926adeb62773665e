"""What the commands share: how they read their flags, speak on a terminal, and print a plan."""
