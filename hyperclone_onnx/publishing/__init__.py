"""Publishing files all at once, or not at all.

In: files that were written into a folder beside the output. Out: the same files under their final names.
"""
