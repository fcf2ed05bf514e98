"""`python -m vitarium`: the command line without the `vitarium` script."""

from vitarium.cli import main

main()
