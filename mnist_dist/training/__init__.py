"""The loop, to be read top to bottom, and what it is made of."""
