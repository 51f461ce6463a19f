"""Plans for many devices: the placement of experts, the exchange of rows, and the predicted
cost."""
