"""`python -m gatebook` is the command `gatebook`."""

from gatebook.cli import main

main(prog_name="gatebook")
