"""What the command ``qlora`` needs and a program of one's own does not: the config, the training run, reports."""
