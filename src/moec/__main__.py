"""`python -m moec`: the command line."""

from moec.compiler.cli.main import main

main()
