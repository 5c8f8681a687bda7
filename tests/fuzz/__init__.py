"""Random input to everything that takes input: it is answered, or refused by an error that helps, and in time."""
