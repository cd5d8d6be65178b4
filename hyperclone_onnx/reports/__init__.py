"""What the commands print.

In: the results of the other packages. Out: text for a terminal, or plain data for JSON.
"""
