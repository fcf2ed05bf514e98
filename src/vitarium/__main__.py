"""`python -m vitarium`: the command line, where the `vitarium` script is not on the path."""

from vitarium.cli import main

main()
