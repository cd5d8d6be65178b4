"""Makes a small model out of a large one.

In: a model file, and how it shrinks. Out: the small model's file, and a report of how far its outputs moved.
"""
