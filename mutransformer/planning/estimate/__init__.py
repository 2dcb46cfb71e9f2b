"""Memory and lower bounds of a step by arithmetic, without a compiler or a device."""
