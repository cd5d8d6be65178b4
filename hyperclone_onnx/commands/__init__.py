"""The command line: a file for each command.

In: the arguments of one command. Out: an exit code, the result on stdout, and progress and errors on stderr.
"""
