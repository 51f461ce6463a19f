"""What a change of the model costs, measured on calibration data."""
