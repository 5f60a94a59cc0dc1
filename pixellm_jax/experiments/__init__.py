"""Recipe files, and the experiments on shapes: the demo and the ablations."""
