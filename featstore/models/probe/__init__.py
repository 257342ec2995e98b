"""The instrument proves itself on the model at hand: short tests on random tokens, run when a command needs them."""
