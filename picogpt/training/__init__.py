"""Training runs: from what is asked for to a plan, from a plan to a run on disk, and a forecast of what it takes."""
