"""`python -m pixelgrow`: the command line."""

from pixelgrow.cli.main import main

main()
