"""Cost of a program: time, memory and traffic, measured here or compiled for absent chips."""
