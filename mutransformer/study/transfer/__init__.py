"""The transfer report: whether the best learning rate is the same at every width, and whether wider is better."""
