"""The command line, one file per command. ``cli.main`` lists the commands and turns exceptions into exit codes."""
