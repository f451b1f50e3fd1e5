"""`python -m mixerzoo` is `mixerzoo`."""

from mixerzoo.cli import main

main(prog_name="mixerzoo")
