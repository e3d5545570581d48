"""Pages of tables and plots, from results."""
