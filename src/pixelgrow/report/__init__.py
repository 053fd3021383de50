"""Results for people to read: tables on the command line, and the HTML report at the end of a run.

Reads the files of finished stages (`stage.json`, `log.jsonl`, sample grids) and changes none.
"""
