"""What a run shows: sample grids, the model card, and the HTML report."""
