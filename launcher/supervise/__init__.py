"""Run the ranks: start them, watch them, explain a failure, and start them again."""
