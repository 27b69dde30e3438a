"""What a run takes of the memory: the limit, what is predicted, and the record of what it was."""
