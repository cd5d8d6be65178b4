"""Publishing files all at once, or not at all.

In: files that are written in a folder beside the output. Out: the same files under their final names.
"""
