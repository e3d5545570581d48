"""Plans, explanations, tables and measurements of optimizer state."""
