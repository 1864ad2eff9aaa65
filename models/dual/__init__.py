"""Models that compare pictures and texts: two encoders whose vectors of a pair lie close together."""
