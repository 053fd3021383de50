"""The command line: one file a verb, or two where a verb has work of its own behind it (`sample`, `grow`, `average`).

The topmost room: it may import every other, and none imports it. Slow imports wait inside the verbs, so that `--help`
and a mistyped option answer at once.
"""
