"""What people read: the tables of the command line, and the HTML page at the end of a run.

Reads what stages have written (`stage.json`, `log.jsonl`, pictures); changes nothing.
"""
