"""What a run shows: sample grids and the model card."""
