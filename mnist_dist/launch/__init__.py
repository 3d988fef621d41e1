"""Starts processes. Nothing here imports torch: a launcher is ready long before torch would be."""
