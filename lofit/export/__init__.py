"""Trained offsets folded into biases, and written for other programs."""
