"""The algorithm in tensors: transitions, trajectories and rollouts, the window schedule, advantages, objectives."""
