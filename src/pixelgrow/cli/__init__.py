"""The command line. `main` is the entry point; `verbs`, `edit` and `data` declare the verbs and their options; a verb
with work of its own has a file for it.

The topmost room: it may import every other, and none imports it. Slow imports wait inside the verbs, so that `--help`
and a mistyped option answer at once.
"""
