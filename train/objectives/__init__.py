"""One file for each thing that can be trained; `train.objective.get_objective` finds it by name."""
