"""Training runs. Each file opens with its command and the result to expect from it."""
