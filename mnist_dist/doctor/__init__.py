"""Checks whether a run would work on this machine. They change nothing."""
