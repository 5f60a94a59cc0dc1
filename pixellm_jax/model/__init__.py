"""The modules of the paper's figure, and their composition."""
