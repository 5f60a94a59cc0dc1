"""From a recipe file to a run; the shapes demo and the ablations."""
