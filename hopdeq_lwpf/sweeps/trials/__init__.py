"""What one trial of each task is asked to do, and does."""
