"""One report on the hardware at hand: `mutransformer benchmark --report`. A section is a module with one function."""
