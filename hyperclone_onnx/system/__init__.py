"""Processes, memory, disk, signals and the environment that Python runs in.

In: functions to run, and bytes to read or write. Out: their results, with limits and failures turned into our errors.
Nothing here knows what a model is.
"""
