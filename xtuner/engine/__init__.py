"""Training: build mesh, model and optimizer, run the loop, leave a report."""
