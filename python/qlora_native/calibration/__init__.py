"""Calibrated quantisation: the statistics of what goes into a weight, and codes and scales chosen by them."""
