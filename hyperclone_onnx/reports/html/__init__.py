"""Reports as one HTML page that needs no network: `--html FILE` of the commands.

In: the reports of analysis, expansion, validation and diagnosis. Out: the text of a page. Every text that comes from a
model is escaped where an element is made (`elements.py`); the page allows no other script than its own.
"""
