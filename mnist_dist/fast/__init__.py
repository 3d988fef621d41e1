"""Shortcuts that save time. Without them, runs are slower; only rounding and the values that dropout drops differ.

Private names of torch are used only here. Each module opens with what it saves.
"""
