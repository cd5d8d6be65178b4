"""Processes, memory, disk and signals.

In: functions to run, and bytes to read or write. Out: their results, with limits and failures turned into our errors.
Nothing here knows what a model is.
"""
