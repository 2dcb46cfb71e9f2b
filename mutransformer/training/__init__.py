"""A training run: the program, the loop, and what it saves and logs."""
