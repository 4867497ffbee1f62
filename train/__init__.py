"""Training of targets, draft heads and judges: data, objectives, one step, one entry point."""
