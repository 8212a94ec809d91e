"""Generation, scores, and the control that shows how much of a score comes from looking."""
