"""Trained offsets as files: found by name, folded into biases, written for other programs."""
