"""`python -m llmo.doors.cli`: the command line without the installed script."""

from llmo.doors.cli.app import main

main()
