"""The coordinate check: activation sizes, and their changes in training, as functions of width or depth."""
