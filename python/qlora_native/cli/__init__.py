"""The command line, one file per verb. ``cli.main`` lists the verbs and turns exceptions into exit codes."""
