"""The parity report: its data, and the forms it is read in: terminal, Markdown, HTML, JUnit XML.

`data` is what the comparison fills in and what report.json holds; every form is made from it alone, so a report can be
rendered again without running anything.
"""
