"""Training of numbers of a changed model on calibration data."""
