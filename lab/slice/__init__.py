"""What a training step would take on a slice of TPUs that is not here: it is compiled for the slice, and read."""
