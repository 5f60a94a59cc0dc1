"""What a program costs: time, memory and traffic, here and on absent chips."""
