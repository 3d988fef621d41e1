"""Train an image classifier from a folder of pictures on any number of processes, with the same result."""

__version__ = "0.1.0"
