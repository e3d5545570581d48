"""What optimizers hold and what they lose: plans, explanations, tables and measurements."""
