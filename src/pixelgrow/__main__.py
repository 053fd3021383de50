"""`python -m pixelgrow`: the command line."""

from pixelgrow.cli import main

main()
