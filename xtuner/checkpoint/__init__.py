"""State that outlives a process: sharded checkpoints to resume from, Hugging Face directories to exchange."""
