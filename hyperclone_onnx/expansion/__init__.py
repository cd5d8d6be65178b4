"""In: a model, and the request of a growth.

Out: the grown model, validated and published, and the report of it.
"""
