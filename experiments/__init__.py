"""What a person runs: `python -m experiments.compare` is the main job."""
