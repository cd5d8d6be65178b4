"""The command line.

In: arguments. Out: an exit code, results on stdout, and progress and errors on stderr.
"""
