"""The boxes of the paper's figure, and their composition."""
