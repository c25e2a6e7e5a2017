"""Several processes under torchrun: one loss computed by all, weights split over them."""
