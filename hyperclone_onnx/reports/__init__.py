"""Print the reports of the commands, one file for each report.

In: the results of analysis, expansion, validation, diagnosis and handoff. Out: lines and tables on a console, or plain
data for JSON.
"""
