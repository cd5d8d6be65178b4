"""What the commands print: a file for each report.

In: the results of analysis, expansion and validation. Out: lines and tables on a console, or plain data for JSON.
"""
