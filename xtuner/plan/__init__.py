"""What a run needs, before it is run: memory, traffic and time of the real engine on tensors without data."""
