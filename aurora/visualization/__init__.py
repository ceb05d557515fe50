"""Pictures of what the vision tower merged."""
