"""What a plan is made from: a model, the work, and the loads of its experts."""
