"""Shortcuts. Without any of them results stay the same, but for rounding and which values dropout drops; only slower.

This is the only place for private names of torch. Each module opens with what it saves.
"""
